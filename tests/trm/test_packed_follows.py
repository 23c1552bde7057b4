"""A packed TRM is never stale: steps, loading and copies are followed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_trm import ask, assert_same_ranking, eager, make

from deeprec.trm import PreferenceAwareTRM


def assert_follows(model: PreferenceAwareTRM) -> None:
    asked = ask(model, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            model.pack().user_vectors(*asked), eager(model, *asked), rtol=0, atol=1e-5
        )
        found = model.retrieve(*asked, 5)
        assert_same_ranking(model, eager(model, *asked), found, 5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_an_optimizer_step_is_followed(fused: bool, train: bool) -> None:
    model = make()
    held = model.pack()
    asked = ask(model, 4)
    held.retrieve(*asked, 5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    for _ in range(2):
        if train:
            model.train()
        model.user_vectors(*asked).square().sum().backward()
        if train:
            # Packed within a training step, after the mode was set.
            with model.evaluating():
                assert_follows(model)
        optimizer.step()
        with pytest.raises(RuntimeError, match="changed since"):
            held.user_vectors(*asked)
        with model.evaluating():
            assert_follows(model)
        model.eval()
        assert_follows(model)


def test_an_optimizer_of_other_parameters_changes_nothing() -> None:
    model = make()
    held = model.pack()
    other = torch.nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=1.0).step()
    assert model.pack() is held
    held.user_vectors(*ask(model, 2))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_parameters_is_followed(assign: bool) -> None:
    model = make()
    assert_follows(model)
    model.load_state_dict(make(seed=1).state_dict(), assign=assign)
    assert_follows(model)


def test_modules_in_the_place_of_others_are_followed() -> None:
    model = make()
    assert_follows(model)
    norm = torch.nn.LayerNorm(model.config.hidden)
    torch.nn.init.uniform_(norm.weight)
    model.OutLayerNorm = norm
    assert_follows(model)
    model.trm_encoder.layer[0] = copy.deepcopy(make(seed=3).trm_encoder.layer[0])
    assert_follows(model)
    with torch.no_grad():
        model.trm_encoder.layer[0].feed_forward.linear_1.weight.add_(0.5)
    assert_follows(model)


def test_every_parameter_is_watched() -> None:
    model = make()
    for name, parameter in model.named_parameters():
        held = model.pack()
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.5
        assert not held.fresh, name
    model.train()
    model.eval()
    assert model.pack() is not held


def test_copies_have_packs_of_their_own() -> None:
    model = make()
    assert_follows(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.item_embedding.weight[1:] += 1
        assert_follows(other)
        assert_follows(model)
    del model
    assert_follows(other)
