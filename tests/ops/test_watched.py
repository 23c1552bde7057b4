"""Who looks on sees every op; where nobody does, calls take the short way."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from deeprec import ItemIndex, topk_retrieve
from deeprec.ops.watched import watched


class Names(TorchDispatchMode):
    """Collects the names of ops."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("index", [False, True])
def test_modes_and_profilers_see_ops(index: bool) -> None:
    items, queries = torch.randn(600, 8), torch.randn(3, 8)
    table = ItemIndex(items) if index else items
    assert not watched(queries)
    expected = topk_retrieve(queries, table, 5)
    with Names() as names:
        found = topk_retrieve(queries, table, 5)
    assert "deeprec::topk" in names.seen
    assert torch.equal(found.indices, expected.indices)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        topk_retrieve(queries, table, 5)
    assert "deeprec::topk" in {event.name for event in profiled.events()}


def test_subclasses_are_watched() -> None:
    class Mine(torch.Tensor):
        pass

    assert watched(torch.ones(2), torch.ones(2).as_subclass(Mine))
    assert not watched(torch.ones(2))
    assert not watched()
