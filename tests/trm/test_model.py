from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprec.ops import SeenItems
from deeprec.trm import PreferenceAwareTRM, TRMConfig

DATA = Path(__file__).parent.parent / "data"


def reference(name: str) -> tuple[dict, dict, dict]:
    """Configuration, parameters, and inputs with expected outputs of a parity fixture."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    config = json.loads(str(arrays.pop("config")))
    state = {
        key.removeprefix("param."): torch.from_numpy(value)
        for key, value in arrays.items()
        if key.startswith("param.")
    }
    rest = {k: torch.from_numpy(v) for k, v in arrays.items() if not k.startswith("param.")}
    return config, state, rest


def small_model(n_items: int = 30, max_length: int = 7, seed: int = 0) -> PreferenceAwareTRM:
    torch.manual_seed(seed)
    config = TRMConfig(
        n_items=n_items, text_dim=12, hidden=8, inner=16, n_experts=3, max_length=max_length
    )
    return PreferenceAwareTRM(config, torch.randn(n_items, 12)).eval()


def histories(model: PreferenceAwareTRM, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = model.config.max_length
    lengths = torch.randint(1, width + 1, (rows,))
    history = torch.randint(1, model.config.n_items + 1, (rows, width))
    return history * (torch.arange(width) < lengths[:, None]), lengths


@pytest.mark.parametrize("name", ["trm_small", "trm_odd_length"])
def test_reference_checkpoint_gives_the_reference_outputs(name: str) -> None:
    config, state, data = reference(name)
    model = PreferenceAwareTRM.from_reference(config, state)
    asked = (data["item_seq"], data["item_seq_len"], data["query_text_emb"])
    with torch.no_grad():
        torch.testing.assert_close(
            model.user_vectors(*asked), data["user_vector"], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(model.scores(*asked), data["scores"], rtol=0, atol=1e-5)
    assert set(model.state_dict()) == set(state)


@pytest.mark.parametrize("name", ["trm_small", "trm_odd_length"])
def test_retrieve_ranks_as_the_reference_scores(name: str) -> None:
    config, state, data = reference(name)
    model = PreferenceAwareTRM.from_reference(config, state)
    found = model.retrieve(data["item_seq"], data["item_seq_len"], data["query_text_emb"], 20)
    expected = data["scores"].topk(20)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-5)
    picked = data["scores"].gather(1, found.indices)
    torch.testing.assert_close(picked, expected.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [("bidirectional", False), ("hidden_act", "relu"), ("adaptor_layers", [48, 40, 32])],
)
def test_a_reference_option_without_counterpart_is_refused(option: str, value: object) -> None:
    config, state, _ = reference("trm_small")
    with pytest.raises(ValueError, match=option):
        PreferenceAwareTRM.from_reference({**config, option: value}, state)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 100))
def test_padding_and_neighbours_in_the_batch_change_nothing(
    max_length: int, extra: int, seed: int
) -> None:
    model = small_model(max_length=max_length, seed=seed)
    history, lengths = histories(model, 1 + extra)
    preference = torch.randn(1 + extra, 12)
    with torch.no_grad():
        together = model.user_vectors(history, lengths, preference)
        cut = history[:1, : int(lengths[0])]
        alone = model.user_vectors(cut, lengths[:1], preference[:1])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


def test_no_preference_is_a_zero_preference() -> None:
    model = small_model()
    history, lengths = histories(model, 5)
    with torch.no_grad():
        none = model.user_vectors(history, lengths)
        zeros = model.user_vectors(history, lengths, torch.zeros(5, 12))
    torch.testing.assert_close(none, zeros, rtol=0, atol=0)


def test_history_and_preference_parts_compose() -> None:
    model = small_model()
    history, lengths = histories(model, 5)
    preference = torch.randn(5, 12)
    with torch.no_grad():
        states = model.history_states(history, lengths)
        parts = model.with_preference(states, preference)
        torch.testing.assert_close(parts, model.user_vectors(history, lengths, preference))


def test_retrieve_honours_exclusions_and_never_returns_padding() -> None:
    model = small_model(n_items=12)
    history, lengths = histories(model, 6)
    found = model.retrieve(history, lengths, None, 12, exclude=SeenItems.from_padded(history))
    for row, seen, length in zip(found.indices.tolist(), history.tolist(), lengths, strict=True):
        left = set(range(1, 13)) - set(seen[: int(length)])
        assert set(row[: len(left)]) == left
        assert row[len(left) :] == [-1] * (12 - len(left))
    assert (found.values[found.indices == -1] == -torch.inf).all()
    assert (model.retrieve(history, lengths, None, 12).indices > 0).all()


def test_retrieve_follows_every_kind_of_update() -> None:
    model = small_model()
    history, lengths = histories(model, 4)

    def check() -> None:
        found = model.retrieve(history, lengths, None, 5)
        scores = model.scores(history, lengths).detach()
        torch.testing.assert_close(found.values, scores.topk(5).values, rtol=0, atol=1e-5)

    check()
    # A fused optimizer leaves the version counters of the parameters alone.
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True
    )
    model.train().user_vectors(history, lengths).sum().backward()
    optimizer.step()
    model.eval()
    check()
    model.load_state_dict(small_model(seed=1).state_dict())
    check()
    model.train()
    assert model.retrieve(history, lengths, None, 5).values.isfinite().all()
    assert model.training


def test_gradients_reach_everything_but_the_texts() -> None:
    model = small_model().train()
    history, lengths = histories(model, 16)
    model.scores(history, lengths, torch.randn(16, 12))[:, 1:].logsumexp(-1).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["item_plm_embedding.weight"]
    assert model.item_embedding.weight.grad is not None
    assert not model.item_embedding.weight.grad[0].any()


def test_save_and_load_and_copies(tmp_path: Path) -> None:
    model = small_model()
    history, lengths = histories(model, 4)
    expected = model.retrieve(history, lengths, None, 5)
    model.save(tmp_path / "trm")
    assert [path.name for path in (tmp_path / "trm").iterdir()] == ["trm.safetensors"]
    for other in (
        PreferenceAwareTRM.load(tmp_path / "trm"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert not other.training
        assert other.config == model.config
        found = other.retrieve(history, lengths, None, 5)
        assert torch.equal(found.indices, expected.indices)


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"trm\.safetensors"):
        PreferenceAwareTRM.load(tmp_path)


def test_load_says_what_is_damaged(tmp_path: Path) -> None:
    path = small_model().save(tmp_path)
    content = path.read_bytes()
    for bad in (b"", b"no tensors", content[: len(content) // 2]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"trm\.safetensors is damaged"):
            PreferenceAwareTRM.load(tmp_path)
    path.write_bytes(content.replace(b"n_layers", b"n_towers"))
    with pytest.raises(ValueError, match=r"another version.*n_towers"):
        PreferenceAwareTRM.load(tmp_path)
    config, state, _ = reference("trm_small")
    del config["n_exps"]
    with pytest.raises(ValueError, match="'n_exps' is missing"):
        PreferenceAwareTRM.from_reference(config, state)


def test_bad_requests_name_the_argument() -> None:
    model = small_model()
    history, lengths = histories(model, 3)
    with pytest.raises(ValueError, match="history"):
        model.user_vectors(torch.ones(3, 8, dtype=torch.long), lengths)
    with pytest.raises(ValueError, match="lengths"):
        model.user_vectors(history, lengths[:2])
    with pytest.raises(TypeError, match="lengths: expected int64"):
        model.user_vectors(history, lengths.float())
    with pytest.raises(ValueError, match="lengths"):
        model.user_vectors(history, torch.tensor([1, 0, 2]))
    with pytest.raises(ValueError, match="lengths"):
        model.user_vectors(history[:, :3], torch.tensor([1, 4, 2]))
    with pytest.raises(ValueError, match="preference"):
        model.user_vectors(history, lengths, torch.zeros(3, 11))
    with pytest.raises(ValueError, match="item_texts"):
        PreferenceAwareTRM(model.config, torch.zeros(31, 12))


@pytest.mark.parametrize(
    "change", [{"hidden": 9}, {"n_items": 0}, {"dropout": 1.0}, {"adaptor_dropout": -0.1}]
)
def test_bad_configuration_names_the_field(change: dict) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        TRMConfig(**{"n_items": 3, "text_dim": 4, "hidden": 8, "n_heads": 2, **change})
