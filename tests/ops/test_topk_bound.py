"""The prefilter's error bound: tight where it must be, and needed: a weaker one loses items.

Rows and queries are made in the rotated space in which they are coded (topk_encode.cpp). With 64
dimensions the rotation is the normalised Hadamard transform, its own inverse; entries are
multiples of 1/512, so that fp32 holds the rotated vectors exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deeprec import _C, ItemIndex
from deeprec.ops.reference.topk import topk as reference_topk

DIM, ROWS, BLOCK, K = 64, 2048, 32, 20
ALMOST_HALF = 255 / 512
ERROR, NORM = 1, 2  # columns of an index's bounds


@pytest.fixture(autouse=True)
def restore_isa() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


def rotated(vectors: Tensor) -> Tensor:
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < DIM:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    out = vectors.double() @ hadamard / DIM**0.5
    assert torch.equal(out.float().double(), out)
    return out.float()


def rows_at_the_bound() -> tuple[Tensor, Tensor]:
    """The query is coded without error, every row's error points along it."""
    rows = torch.full((ROWS, DIM), 124 + ALMOST_HALF)
    rows[1::2] *= -1  # no common part to take out
    ruler = torch.full((DIM,), 127.0)  # gives every block the scale 1
    ruler[1::2] *= -1
    rows[BLOCK - 1 :: BLOCK] = ruler
    return rotated(torch.ones(1, DIM)), rotated(rows)


def query_at_the_bound() -> tuple[Tensor, Tensor]:
    """Rows are coded without error, the query's error points along them."""
    rows = torch.full((ROWS, DIM), 127.0)
    rows[:, 0] = 0
    rows[1::2] *= -1
    query = torch.full((1, DIM), 10 + ALMOST_HALF)
    query[:, 0] = 127
    return rotated(query), rotated(rows)


CASES = {"rows": (rows_at_the_bound, ERROR), "query": (query_at_the_bound, NORM)}


def same_as_reference(index: ItemIndex, query: Tensor, items: Tensor) -> bool:
    values, indices = reference_topk(query, items, None, None, K)
    found = index.search(query, K)
    return torch.equal(found.indices, indices) and torch.equal(found.values, values)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("isa", _C.available_isas())
def test_rows_exactly_at_the_bound_are_found(case: str, isa: str) -> None:
    _C.set_isa(isa)
    query, items = CASES[case][0]()
    index = ItemIndex(items)
    assert same_as_reference(index, query, items)
    assert index.stats().rescored < len(items), "the codes decided nothing"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("isa", _C.available_isas())
def test_a_bound_one_percent_weaker_loses_items(case: str, isa: str) -> None:
    """Without this, a search that ignored the bound might pass every other test."""
    _C.set_isa(isa)
    make, column = CASES[case]
    query, items = make()
    index = ItemIndex(items)
    assert index._table is not None
    index._table[1][:, column] *= 0.99
    assert not same_as_reference(index, query, items)


def test_bounds_hold_for_every_row_and_are_not_slack() -> None:
    """Decode the codes: no row is farther from its own than the bound, and some is as far."""
    torch.manual_seed(0)
    items = torch.randn(1000, DIM) * torch.randn(1000, 1).exp()
    index = ItemIndex(items)
    assert index._table is not None
    codes, bounds, order, center = index._table[:4]
    stored = items[order.long()].double() - (center if len(center) else 0)
    decoded = (codes.double() - 128).permute(0, 2, 1, 3).reshape(-1, DIM)[: len(items)]
    scale = bounds[:, 0].double().repeat_interleave(BLOCK)[: len(items), None]
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < DIM:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    y = stored @ hadamard / DIM**0.5 * scale
    for column, length in ((ERROR, (y - decoded).norm(dim=1)), (NORM, y.norm(dim=1))):
        bound = bounds[:, column].double().repeat_interleave(BLOCK)[: len(items)]
        assert (length <= bound).all()
        blocks = torch.arange(len(items)) // BLOCK
        largest = torch.zeros(len(bounds), dtype=torch.float64).scatter_reduce(
            0, blocks, length, "amax"
        )
        assert (largest > 0.9999 * bounds[:, column]).all()
