"""Who looks on sees every op; where nobody does, calls take the short way."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_and_transforms_see_ops() -> None:
    items = torch.randn(600, 8)

    def best(queries: torch.Tensor) -> torch.Tensor:
        return topk_retrieve(queries, items, 2).values + 0

    traced = torch.jit.trace(best, (torch.randn(3, 8),), check_trace=False)
    other = torch.randn(3, 8)
    assert torch.equal(traced(other), best(other))
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Functions():
        best(other)
    assert any("deeprec.topk" in name for name in seen)
    torch.func.vmap(lambda x: seen.append(watched()) or x)(other)
    assert seen[-1] is True


def test_subclasses_are_watched() -> None:
    class Mine(torch.Tensor):
        pass

    assert watched(torch.ones(2), torch.ones(2).as_subclass(Mine))
    assert not watched(torch.ones(2))
    assert not watched()
