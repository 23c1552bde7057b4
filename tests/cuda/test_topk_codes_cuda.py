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
