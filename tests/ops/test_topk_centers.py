"""Tables of clusters: rows coded about their cluster's center, and the second level of codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_topk import assert_same, brute_force, random_seen
from torch import Tensor
from torch.nn import functional as F

from deeprec import _C, ItemIndex, SeenItems, topk_retrieve
from deeprec.ops.index import CENTER, CLUSTER, FINE, FINE_BOUNDS

N, DIM, CLUSTERS, BLOCK = 9000, 24, 40, 32
TIGHT, LOOSE = 0.01, 0.4


@pytest.fixture(autouse=True)
def restore_isa() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


def clustered(noise: float, n: int = N, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Directions about a few, and queries like them."""
    g = torch.Generator().manual_seed(0)
    middle = F.normalize(torch.randn(CLUSTERS, dim, generator=g), dim=1)
    x, q = (
        middle[torch.randint(CLUSTERS, (m,), generator=g)]
        + noise * dim**-0.5 * torch.randn(m, dim, generator=g)
        for m in (n, 9)
    )
    return F.normalize(x, dim=1), F.normalize(q, dim=1)


def parts(index: ItemIndex) -> tuple[int, int]:
    """Centers, and rows with 16-bit codes."""
    assert index._table is not None
    return len(index._table[CENTER]) if len(index._table[CLUSTER]) else 1, len(index._table[FINE])


def hard_tables() -> dict[str, tuple[Tensor, Tensor]]:
    x, q = clustered(TIGHT)
    g = torch.Generator().manual_seed(1)
    outliers = x.clone()
    outliers[::97] *= 1e6
    low_rank = torch.randn(N, 3, generator=g) @ torch.randn(3, DIM, generator=g)
    return {
        "tight": (q, x),
        "loose": clustered(LOOSE)[::-1],
        "duplicates": (q, x[:CLUSTERS].repeat(N // CLUSTERS, 1)),
        "skewed norms": (q, x * torch.randn(N, 1, generator=g).mul(3).exp()),
        "outliers": (q, outliers),
        "low rank": (q, low_rank),
        "far from zero": (q, x + 100),
        "tiny": (q * 1e-20, x * 1e-24),
        "huge": (q * 1e18, x * 1e18),
        "denormal": (q * 1e20, x * 1e-42),
    }


@pytest.mark.parametrize("name", hard_tables())
def test_exact_on_every_instruction_set(name: str) -> None:
    queries, items = hard_tables()[name]
    index = ItemIndex(items)
    seen = random_seen(len(items), len(queries), 400)
    for exclude in (None, seen):
        expected = brute_force(queries, items, 15, exclude)
        for isa in _C.available_isas():
            _C.set_isa(isa)
            assert_same(index.search(queries, 15, exclude), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_items(dtype: torch.dtype) -> None:
    items, queries = clustered(LOOSE)
    index = ItemIndex(items.to(dtype))
    assert parts(index)[0] > 1
    assert_same(index.search(queries, 15), brute_force(queries, items.to(dtype), 15))


def test_levels_are_built_where_they_pay() -> None:
    torch.manual_seed(0)
    assert parts(ItemIndex(torch.randn(N, 2 * DIM))) == (1, 0)
    assert parts(ItemIndex(clustered(LOOSE, dim=64)[0]))[0] > CLUSTERS
    centers, fine = parts(ItemIndex(tight_and_large()[0]))
    assert centers > CLUSTERS
    assert fine == 40_000
    assert "16-bit codes about" in repr(ItemIndex(tight_and_large()[0]))


def test_half_the_rows_are_outliers() -> None:
    items, queries = clustered(TIGHT, 8192)
    items[::2] *= 1e3
    assert_same(ItemIndex(items).search(queries, 10), topk_retrieve(queries, items, 10))


def tight_and_large() -> tuple[Tensor, Tensor]:
    """A thousand rows a cluster that eight bits cannot tell apart."""
    return clustered(TIGHT, 40_000)


def test_few_exact_scores_are_needed() -> None:
    items, queries = tight_and_large()
    index = ItemIndex(items)
    index.search(queries, 20)
    both = index.stats()
    assert both.refined_per_query > 400
    assert both.rescored_per_query < 5 * 20
    assert index._table is not None
    index._table[FINE] = index._table[FINE][:0]
    index._table[FINE_BOUNDS] = index._table[FINE_BOUNDS][:0]
    index.search(queries, 20)
    assert index.stats().refined == 0
    assert index.stats().rescored > 4 * both.rescored


def test_threads_batches_and_rounds_change_nothing() -> None:
    items, queries = clustered(TIGHT)
    index, before = ItemIndex(items), torch.get_num_threads()
    expected = brute_force(queries, items, 12)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same(index.search(queries, 12), expected)
            assert_same(index.search(queries[4:5], 12), brute_force(queries[4:5], items, 12))
            many = index.search(queries.repeat(500, 1), 12)  # more than a round
            for first in (0, 4095 // 9 * 9, 4491):
                assert torch.equal(many.indices[first : first + 9], expected.indices)
    finally:
        torch.set_num_threads(before)
    bad = queries.repeat(500, 1)
    bad[4200, 3] = torch.nan
    with pytest.raises(ValueError, match="row 4200 holds NaN"):
        index.search(bad, 12)


def test_updates_save_and_load(tmp_path: Path) -> None:
    items, queries = tight_and_large()
    index = ItemIndex(items)
    rows = torch.randperm(len(items), generator=torch.Generator().manual_seed(2))[:300]
    vectors = torch.cat([torch.randn(100, DIM), queries.repeat(23, 1)[:200] * 1.01])
    index.update(rows, vectors)
    items[rows] = vectors
    expected = topk_retrieve(queries, items, 20)
    assert_same(index.search(queries, 20), expected)
    index.save(tmp_path / "index")
    loaded = ItemIndex.load(tmp_path / "index")
    assert parts(loaded) == parts(index)
    assert_same(loaded.search(queries, 20), expected)
    assert loaded.stats() == index.stats()


def test_the_second_bound_holds_and_is_not_slack() -> None:
    """Decode the 16-bit codes: no row is farther from its own than the bound, some is as far."""
    items, _ = tight_and_large()
    index = ItemIndex(items)
    assert index._table is not None
    _, _, order, center, cluster, fine, bounds = index._table
    block = torch.arange(len(items)) // BLOCK
    y = items[order.long()].double() - center[cluster.long()[block]]
    y = rotated(y) * bounds[block, 0].double()[:, None]
    distance = (y - fine.double()).norm(dim=1)
    assert (distance <= bounds[block, 1].double()).all()
    largest = torch.zeros(len(bounds), dtype=torch.float64).scatter_reduce(
        0, block, distance, "amax"
    )
    assert (largest > 0.999 * bounds[:, 1]).all()


def test_a_second_bound_of_the_wrong_sign_loses_items() -> None:
    items, queries = tight_and_large()
    index = ItemIndex(items)
    expected = topk_retrieve(queries, items, 20)
    assert index._table is not None
    index._table[FINE_BOUNDS][:, 1] *= -1
    assert not torch.equal(index.search(queries, 20).indices, expected.indices)


def test_wrong_centers_lose_items() -> None:
    items, queries = clustered(LOOSE)
    index = ItemIndex(items)
    expected = topk_retrieve(queries, items, 20)
    assert index._table is not None
    index._table[CENTER][1:] *= 0.9
    assert not torch.equal(index.search(queries, 20).indices, expected.indices)


def rotated(vectors: Tensor) -> Tensor:
    """The map of topk_rotate.h: Hadamard transforms at the front, then at the back."""
    dim, size = vectors.shape[1], 1 << (vectors.shape[1].bit_length() - 1)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    hadamard /= size**0.5
    out = vectors.clone()
    for part in (slice(0, size), slice(dim - size, dim)) if size != dim else (slice(0, size),):
        out[:, part] = out[:, part] @ hadamard
    return out


def test_exclusions_cover_a_whole_cluster() -> None:
    """The nearest cluster is excluded: the answers lie in blocks that were ruled out with it."""
    items, queries = clustered(TIGHT)
    index = ItemIndex(items)
    best = topk_retrieve(queries, items, N // CLUSTERS * 2)
    seen = SeenItems.from_lists(best.indices.tolist())
    assert_same(index.search(queries, 10, seen), topk_retrieve(queries, items, 10, exclude=seen))
