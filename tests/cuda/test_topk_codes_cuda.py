"""Exact top-k by codes on emulated tensor cores: every bit, whatever the codes leave out."""

from __future__ import annotations

import pytest
import torch
from test_topk_cuda import DTYPES, assert_same, random_seen
from torch import Tensor

from deeprec import ItemIndex, SeenItems, topk_retrieve


def check(queries: Tensor, items: Tensor, k: int, seen: SeenItems | None = None) -> ItemIndex:
    expected = topk_retrieve(queries, items, k, exclude=seen, backend="reference")
    index = ItemIndex(items)
    assert index._table is not None
    assert_same(index.search(queries, k, seen, backend="cuda"), expected)
    return index


def test_every_schedule_gives_the_same(every_schedule) -> None:
    torch.manual_seed(0)
    items, queries = torch.randint(-2, 3, (700, 11)).float(), torch.randint(-2, 3, (3, 11)).float()
    check(queries, items, 4, random_seen(700, 3, 60))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "dim", "batch", "k"), [(513, 1, 1, 1), (2000, 20, 17, 5), (1100, 131, 3, 40)]
)
def test_shapes_and_dtypes(emulated, dtype: torch.dtype, n: int, dim: int, batch: int, k: int):
    torch.manual_seed(n)
    check(torch.randn(batch, dim), torch.randn(n, dim).to(dtype), k)


def test_few_rows_are_scored_exactly(emulated) -> None:
    torch.manual_seed(0)
    index = check(torch.randn(4, 32), torch.randn(6000, 32), 5)
    assert index.stats().rescored_per_query < 6000 / 8


def test_exclusions_and_batches_of_both_tile_sizes(emulated) -> None:
    torch.manual_seed(1)
    items = torch.nn.functional.normalize(torch.randn(900, 24), dim=1)
    for batch in (2, 18):
        queries = torch.randn(batch, 24)
        seen = SeenItems.from_lists(  # what would have been answered, and more
            sorted({*row, *range(40)})
            for row in topk_retrieve(queries, items, 30, backend="reference").indices.tolist()
        )
        check(queries, items, 7, seen)


def test_overflowing_lists_are_searched_directly(emulated) -> None:
    """All rows tie for one query, so its list overflows; the other's does not."""
    torch.manual_seed(0)
    items = torch.zeros(4500, 4)
    items[:, 0] = torch.randint(-3, 4, (4500,)).float()
    queries = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    check(queries, items, 3)


def test_hard_numbers(emulated) -> None:
    """A common part far larger than the differences, denormals, and scores that overflow."""
    torch.manual_seed(0)
    spread = torch.randn(600, 16)
    queries = torch.randn(3, 16)
    check(queries, 1000 + 1e-3 * spread, 5)
    check(queries, 1e-42 * spread, 5)
    check(1e30 * queries, 1e30 * spread, 5)
    check(1e-30 * queries, 1e-30 * spread, 5)
