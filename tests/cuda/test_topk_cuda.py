"""Exact top-k on the emulated CUDA kernels: every bit, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deeprec import SeenItems, TopK, backends, topk_retrieve

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same(got: TopK, expected: TopK) -> None:
    assert torch.equal(got.indices, expected.indices)
    bits = [answer.values.view(torch.int32) for answer in (got, expected)]
    assert torch.equal(*bits)


def check(queries: Tensor, items: Tensor, k: int, seen: SeenItems | None = None) -> None:
    expected = topk_retrieve(queries, items, k, exclude=seen, backend="reference")
    assert_same(topk_retrieve(queries, items, k, exclude=seen, backend="cuda"), expected)


def random_seen(n: int, batch: int, count: int) -> SeenItems:
    return SeenItems.from_padded(torch.randint(n, (batch, count)), pad=-1)


def test_every_schedule_gives_the_same(every_schedule) -> None:
    torch.manual_seed(0)
    items, queries = torch.randint(-2, 3, (1100, 11)).float(), torch.randint(-2, 3, (9, 11)).float()
    check(queries, items, 21, random_seen(1100, 9, 60))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "dim", "batch", "k"),
    [(1, 1, 1, 1), (5, 3, 2, 7), (300, 20, 9, 5), (130, 9, 3, 129), (257, 33, 17, 10)],
)
def test_shapes_and_dtypes(emulated, dtype: torch.dtype, n: int, dim: int, batch: int, k: int):
    torch.manual_seed(n)
    check(torch.randn(batch, dim), torch.randn(n, dim).to(dtype), k)


def test_ties_zeros_of_both_signs_and_overflow(emulated) -> None:
    items = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [-1e-30, 0.0], [3e38, 3e38], [-3e38, -3e38]])
    queries = torch.tensor([[1e-30, 0.0], [0.0, 0.0], [3e38, 3e38]])
    check(queries, items.repeat(30, 1), 150)


def test_fewer_items_left_than_k(emulated) -> None:
    torch.manual_seed(0)
    items, queries = torch.randn(40, 8), torch.randn(2, 8)
    check(queries, items, 60)
    check(queries, items, 5, SeenItems.from_lists([range(40), range(37)]))
    got = topk_retrieve(queries, torch.empty(0, 8), 3, backend="cuda")
    assert got.indices.eq(-1).all()
    assert topk_retrieve(queries[:0], items, 3, backend="cuda").values.shape == (0, 3)


@pytest.mark.parametrize("k", [480, 481, 1024])
def test_long_lists(emulated, k: int) -> None:
    torch.manual_seed(k)
    check(torch.randn(2, 5), torch.randn(1300, 5), k, random_seen(1300, 2, 100))


def test_k_beyond_the_kernels_is_refused_or_falls_back(emulated) -> None:
    queries, items = torch.randn(1, 4), torch.randn(2000, 4)
    with pytest.raises(RuntimeError, match="k = 1025 is more than its 1024"):
        topk_retrieve(queries, items, 1025, backend="cuda")
    assert topk_retrieve(queries, items, 1025).values.shape == (1, 1025)


def test_without_a_gpu_an_explicit_choice_is_explained() -> None:
    queries, items = torch.randn(1, 4), torch.randn(9, 4)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: tensors are on cpu"):
        topk_retrieve(queries, items, 2, backend="cuda")
    assert "topk_retrieve[cuda]: cannot run" in backends.explain("topk_retrieve", queries, items)
