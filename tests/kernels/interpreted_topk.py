"""Triton's top-k in the interpreter, bit for bit against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deeprec import ItemIndex, SeenItems, topk_retrieve
from deeprec.ops import topk_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(queries: Tensor, items: Tensor, k: int, exclude: SeenItems | None = None) -> None:
    got = topk_retrieve(queries, items, k, exclude=exclude, backend="triton")
    expected = topk_retrieve(queries, items, k, exclude=exclude, backend="reference")
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.values.view(torch.int32), expected.values.view(torch.int32))


def case(
    batch: int, count: int, size: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, size, generator=generator)
    return queries, torch.randn(count, size, generator=generator).to(dtype)


def seen(batch: int, count: int) -> SeenItems:
    """Rows of very different lengths: none, a few, all."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(count, generator=generator)[: 7 * b].tolist() for b in range(batch)]
    rows[-1] = list(range(count))
    return SeenItems.from_lists(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, count, size, k",
    [(1, 1, 1, 1), (3, 33, 7, 5), (5, 130, 40, 1), (17, 70, 8, 20), (2, 70, 65, 90)],
)
def test_triton_odd_shapes(batch: int, count: int, size: int, k: int, dtype: torch.dtype) -> None:
    check(*case(batch, count, size, dtype), k)


def test_triton_exclusions() -> None:
    queries, items = case(5, 150, 12, torch.float32)
    check(queries, items, 10, seen(5, 150))
    check(queries, items, 10, SeenItems.from_lists([[]] * 5))


def test_triton_equal_scores_go_by_index() -> None:
    generator = torch.Generator().manual_seed(2)
    queries = torch.randint(-1, 2, (4, 3), generator=generator).float()
    items = torch.randint(-1, 2, (140, 3), generator=generator).float()
    queries[3] = 0
    check(queries, items, 40, seen(4, 140))


def test_triton_scores_that_differ_only_before_rounding_are_equal() -> None:
    items = torch.zeros(64, 2)
    items[:, 0] = 1
    items[::3, 1] = 2.0**-30  # a larger exact score, the same float32
    check(torch.ones(1, 2), items, 5)


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e-20, 1e18, 1e19, 7e37])
def test_triton_extremes(scale: float) -> None:
    queries, items = case(2, 70, 9, torch.float32)
    check(queries, items * scale, 6)
    check(queries * scale, items * scale, 6)
    items[::2] *= scale
    check(queries, items, 6)


def test_triton_a_full_list_falls_back_to_every_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_triton, "LISTED_PER_K", 0)
    monkeypatch.setattr(topk_triton, "LISTED_MORE", 1)
    queries, items = case(3, 700, 5, torch.float32)
    check(queries, items, 9, seen(3, 700))
    _, _, scored = topk_triton.run(queries, items, None, None, None, 9)
    assert scored[0].tolist() == [700] * 3


def test_triton_scores_few_items_exactly() -> None:
    queries, items = case(2, 3200, 16, torch.float32)
    check(queries, items, 4)
    _, _, scored = topk_triton.run(queries, items, None, None, None, 4)
    assert max(scored[0].tolist()) <= 8 * 32


def test_triton_rounds_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_triton, "WORKSPACE_BYTES", 1)
    queries, items = case(35, 64, 4, torch.float32)
    check(queries, items, 3, seen(35, 64))


def test_triton_many_answers() -> None:
    check(*case(1, 1100, 3, torch.float32), 1024)


def test_triton_index_and_empty() -> None:
    queries, items = case(3, 90, 6, torch.float32)
    for metric in ("ip", "cosine"):
        index = ItemIndex(items, metric=metric)
        got = index.search(queries, 7, backend="triton")
        expected = index.search(queries, 7, backend="reference")
        assert torch.equal(got.indices, expected.indices)
        assert torch.equal(got.values, expected.values)
    check(queries[:0], items, 3)
    check(queries, items[:0], 3)


def test_triton_nan_in_a_query_harms_no_other() -> None:
    queries, items = case(3, 90, 6, torch.float32)
    expected = topk_retrieve(queries, items, 7, backend="reference")
    queries[1, 2] = torch.nan
    values, indices, _ = topk_triton.run(queries, items, None, None, None, 7)
    assert torch.equal(indices[[0, 2]], expected.indices[[0, 2]])
    assert torch.equal(values[[0, 2]], expected.values[[0, 2]])
    assert ((indices[1] >= -1) & (indices[1] < 90)).all()


def test_triton_too_many_answers_are_refused() -> None:
    queries, items = case(1, 1100, 2, torch.float32)
    with pytest.raises(RuntimeError, match="more than the 1024 items"):
        topk_retrieve(queries, items, 1025, backend="triton")
