"""The TRM's ops in torch.library: opcheck, and compiled functions around them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gpu_trm import check_opcheck
from small_trm import ask, make
from torch import Tensor

from deeprec.ops import SeenItems


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    check_opcheck(backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_requests_compile_into_one_graph(backend: str) -> None:
    model = make()
    packed = model.pack()
    exclude = SeenItems.from_lists([[1], [], [2, 3], []])

    def best(history: Tensor, lengths: Tensor, preference: Tensor) -> Any:
        states = packed.history_states(history, lengths)
        users = packed.user_vectors(None, None, preference, states=states)
        found = packed.retrieve(
            history, lengths, preference, 3, exclude=exclude, exclude_history=True
        )
        margin = found.values[:, :1] - found.values[:, 1:]
        return users.norm(dim=1), margin, found.indices

    compiled = torch.compile(best, fullgraph=True, backend=backend)
    for seed in (0, 1):
        asked = ask(model, 4, seed)
        for got, expected in zip(compiled(*asked), best(*asked), strict=True):
            torch.testing.assert_close(got, expected)


def test_a_compiled_function_follows_its_model() -> None:
    model = make()
    asked = ask(model, 4)

    def best(history: Tensor, lengths: Tensor, preference: Tensor) -> Tensor:
        return model.retrieve(history, lengths, preference, 3).indices + 0

    compiled = torch.compile(best, fullgraph=True, backend="aot_eager")
    before = compiled(*asked)
    with torch.no_grad():
        model.item_embedding.weight[1:] = model.item_embedding.weight[1:].flip(0)
    assert torch.equal(compiled(*asked), best(*asked))
    assert not torch.equal(compiled(*asked), before)


def test_a_compiled_function_refuses_a_stale_pack() -> None:
    model = make()
    packed, asked = model.pack(), ask(model, 4)
    compiled = torch.compile(
        lambda *asked: packed.user_vectors(*asked) + 0, fullgraph=True, backend="aot_eager"
    )
    compiled(*asked)
    with torch.no_grad():
        model.position_embedding.weight += 1
    with pytest.raises(RuntimeError, match="changed since"):
        compiled(*asked)


def test_copies_are_asked_by_their_own_name() -> None:
    model = make()
    other = copy.deepcopy(model)
    assert other.name != model.name
    with torch.no_grad():
        other.item_embedding.weight[1:] = other.item_embedding.weight[1:].flip(0)
    asked = ask(model, 4)
    del model
    found = other.retrieve(*asked, 3)
    assert torch.equal(found.indices, other.pack().retrieve(*asked, 3).indices)
    gone = make().name
    with pytest.raises(RuntimeError, match="is gone"):
        torch.ops.deeprec.trm_history(gone, *asked[:2], "")
