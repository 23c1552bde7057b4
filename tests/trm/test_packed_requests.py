"""What a packed TRM refuses, and how it says so."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from small_trm import ask, make
from test_model import reference

from deeprec.ops import SeenItems
from deeprec.trm import HistoryStates, PreferenceAwareTRM


def test_bad_requests_name_the_argument() -> None:
    model = make()
    packed = model.pack()
    history, lengths, preference = ask(model, 3, shortest=9)

    def refused(error: type[Exception], match: str, *asked: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            packed.retrieve(*asked, **{"k": 3, **options})

    refused(ValueError, "lengths.*got 0 in row 1", history, torch.tensor([9, 0, 9]), None)
    refused(ValueError, "lengths.*got 10", history, torch.tensor([9, 10, 9]), None)
    refused(ValueError, "lengths.*shape", history, lengths[:2], None)
    refused(TypeError, "lengths.*int64", history, lengths.float(), None)
    refused(TypeError, "history.*int64", history.int(), lengths, None)
    refused(ValueError, "history.*1 to 9", torch.ones(3, 10, dtype=torch.int64), lengths, None)
    refused(ValueError, "history.*shape", history[0], lengths, None)
    for item in (-1, 0, 41, 2**40):
        wrong = history.clone()
        wrong[1, 0] = item
        refused(IndexError, f"history: row 1 holds {item} at position 0", wrong, lengths, None)
    beyond = torch.ones_like(history)
    refused(ValueError, "history.*beyond its length", beyond, torch.tensor([9, 2, 9]), None)
    refused(ValueError, "preference.*text_dim|preference.*12", history, lengths, preference[:, :5])
    refused(ValueError, "preference", history, lengths, preference[:2])
    refused(TypeError, "preference.*float32", history, lengths, preference.double())
    for bad in (float("nan"), float("inf")):
        wrong = preference.clone()
        wrong[2, 4] = bad
        refused(ValueError, "preference: row 2 holds NaN or inf", history, lengths, wrong)
    refused(ValueError, "lengths: expected on cpu like", history, lengths.to("meta"), None)
    refused(ValueError, "preference: expected on cpu", history, lengths, preference.to("meta"))
    refused(ValueError, "k must be", history, lengths, None, k=0)
    refused(ValueError, "exclude.*3 rows", history, lengths, None, exclude=SeenItems.from_lists([]))
    refused(ValueError, "exclude", history, lengths, None, exclude=[[1], [2], [3]])
    wrong_ids = SeenItems.from_lists([[1], [41], []])
    refused(IndexError, "exclude: row 1 holds 41", history, lengths, None, exclude=wrong_ids)
    refused(ValueError, "history and lengths", None, None, None)
    refused(ValueError, "states", history, lengths, None, states=torch.zeros(3, 5))
    states = packed.history_states(history, lengths)
    refused(ValueError, "exclude_history", None, None, None, states=states, exclude_history=True)
    states[1, 2] = torch.nan
    refused(ValueError, "states: row 1", None, None, None, states=states)
    with pytest.raises(ValueError, match="dtype"):
        model.pack(torch.float16)


@pytest.mark.parametrize(
    "name", ["item_embedding.weight", "trm_encoder.layer.1.feed_forward.linear_2.bias"]
)
def test_weights_that_are_not_finite_are_named(name: str) -> None:
    model = make()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = torch.nan
    history, lengths, preference = ask(model, 3)
    with pytest.raises(ValueError, match=name):
        model.retrieve(history, lengths, preference, 3)


def test_a_checkpoint_of_another_shape_names_the_tensor() -> None:
    with pytest.raises(RuntimeError, match=r"item_embedding\.weight"):
        make().load_state_dict(make(n_items=41).state_dict())
    config, state, _ = reference("trm_small")
    name = "trm_encoder.layer.0.feed_forward.linear_1.weight"
    with pytest.raises(RuntimeError, match=re.escape(name)):
        PreferenceAwareTRM.from_reference(config, state | {name: state[name][:, :-1]})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_refuse_the_same(backend: str) -> None:
    model = make()
    history, lengths, preference = ask(model, 3, shortest=9)
    states = model.pack().history_states(history, lengths)

    def refused(error: type[Exception], match: str, *asked: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            model.pack().retrieve(*asked, 3, backend=backend, **options)

    preference[1, 0] = torch.nan
    refused(ValueError, "preference: row 1 holds NaN", history, lengths, preference)
    wrong = history.clone()
    wrong[2, 3] = 41
    refused(IndexError, "history", wrong, lengths, None, states=states, exclude_history=True)
    none = torch.zeros(3, dtype=torch.int64)
    refused(ValueError, "lengths", history, none, None, states=states, exclude_history=True)
    for item in (0, 41):
        seen = SeenItems.from_lists([[], [item], []])
        refused(IndexError, rf"exclude.* {item}.*1 … 40", history, lengths, None, exclude=seen)
    refused(ValueError, "states: row 0", None, None, None, states=states * torch.nan)


def test_a_cache_checks_first_and_takes_nobody() -> None:
    model = make()
    history, lengths, _ = ask(model, 3)

    def refused(error: type[Exception], match: str, history: Any, lengths: Any) -> None:
        with pytest.raises(error, match=match):
            model.retrieve(history, lengths, None, 3, cache=HistoryStates())

    refused(ValueError, r"lengths: expected shape \(3,\)", history, lengths[:2])
    refused(ValueError, "history: expected item ids", history[0], lengths)
    refused(TypeError, "lengths: expected int64", history, lengths.float())
    refused(ValueError, "history and lengths", None, lengths)
    found = model.retrieve(history.numpy(), lengths.numpy(), None, 3, cache=HistoryStates())
    assert torch.equal(found.indices, model.retrieve(history, lengths, None, 3).indices)
    nobody = model.retrieve(history[:0], lengths[:0], None, 3, cache=HistoryStates())
    assert nobody.indices.shape == (0, 3)


def test_an_item_without_a_vector_is_named() -> None:
    model = make()
    with torch.no_grad():
        model.item_embedding.weight[7] = 0
    with pytest.raises(ValueError, match=r"item_embedding\.weight: row 7 is zero"):
        model.retrieve(*ask(model, 3), 3)
