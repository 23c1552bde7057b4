"""Exact top-k against float64 brute force: every bit, on every instruction set."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opchecks import check_topk
from torch import Tensor

from deeprec import _C, ItemIndex, SeenItems, TopK, backends, topk_retrieve

ISAS = _C.available_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def restore_isa() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


def brute_force(queries: Tensor, items: Tensor, k: int, exclude: SeenItems | None = None) -> TopK:
    """NumPy float64 in the contract's order of additions, then by value and index."""
    q, x = queries.double().numpy(), items.double().numpy()
    lanes = np.zeros((len(q), len(x), 8))
    for d in range(q.shape[1]):
        lanes[:, :, d % 8] += q[:, d, None] * x[None, :, d]
    s = [lanes[:, :, j] for j in range(8)]
    total = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
    with np.errstate(over="ignore"):
        scores = total.astype(np.float32)
    values = np.full((len(q), k), -np.inf, np.float32)
    indices = np.full((len(q), k), -1, np.int64)
    for b, row in enumerate(scores):
        left = np.arange(len(x))
        if exclude is not None:
            left = np.setdiff1d(left, exclude[b : b + 1].ids.numpy())
        order = left[np.lexsort((left, -row[left]))][:k]
        values[b, : len(order)] = row[order]
        indices[b, : len(order)] = order
    return TopK(torch.from_numpy(values), torch.from_numpy(indices))


def assert_same(got: TopK, expected: TopK) -> None:
    assert torch.equal(got.indices, expected.indices)
    bits = [answer.values.view(torch.int32) for answer in (got, expected)]
    assert torch.equal(*bits)


def check_all(queries: Tensor, items: Tensor, k: int, exclude: SeenItems | None = None) -> None:
    """Raw items and an index, on every instruction set, in one process."""
    expected = brute_force(queries, items, k, exclude)
    index = ItemIndex(items)
    for isa in ISAS:
        _C.set_isa(isa)
        assert_same(topk_retrieve(queries, items, k, exclude=exclude), expected)
        assert_same(index.search(queries, k, exclude), expected)


def random_seen(n: int, batch: int, count: int) -> SeenItems:
    return SeenItems.from_padded(torch.randint(n, (batch, count)), pad=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "dim", "batch", "k"),
    [
        (1, 1, 1, 1),
        (5, 3, 2, 7),
        (600, 20, 37, 5),
        (700, 9, 3, 699),
        (2050, 33, 5, 10),
        (3000, 130, 33, 20),
    ],
)
def test_matches_brute_force(n: int, dim: int, batch: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    items, queries = torch.randn(n, dim).to(dtype), torch.randn(batch, dim)
    check_all(queries, items, k)
    check_all(queries, items, k, random_seen(n, batch, 2 * k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_backend_matches_brute_force(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    items, queries = torch.randn(300, 21).to(dtype), torch.randn(7, 21)
    items[::3] = items[0]
    seen = random_seen(300, 7, 40)
    got = topk_retrieve(queries, items, 290, exclude=seen, backend="reference")
    assert_same(got, brute_force(queries, items, 290, seen))


def hard_cases() -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    n, d = 2000, 24
    queries = randn(10, d)
    clusters = randn(8, d)[torch.randint(8, (n,), generator=g)]
    outlier_rows, outlier_dims = randn(n, d), randn(n, d)
    outlier_rows[::97] *= 1e4
    outlier_dims[:, 3] *= 1e3
    wild = randn(n, d)
    wild[5], wild[1000:1010] = 3e38, -1e38
    duplicates = randn(4, d).repeat(n // 4, 1)
    # Rows a hair apart: their exact scores differ in the last bits, their codes do not differ.
    near = randn(1, d).repeat(n, 1)
    near[:, 0] += torch.arange(n) * 2.0**-22
    return {
        "ties": (queries, torch.randint(-1, 2, (n, d), generator=g).float()),
        "all equal": (queries, torch.ones(n, d)),
        "zeros": (queries * 0, randn(n, d)),
        "zero rows": (queries, torch.where(torch.arange(n)[:, None] % 2 == 0, 0.0, randn(n, d))),
        "duplicates": (queries, duplicates),
        "clusters": (clusters[:10] + 1e-3 * randn(10, d), clusters + 1e-3 * randn(n, d)),
        "offset": (queries + 5, randn(n, d) * 0.1 + 7),
        "skewed norms": (queries, randn(n, d) * (3 * randn(n, 1)).exp()),
        "low rank": (queries, randn(n, 2) @ randn(2, d)),
        "outlier rows": (queries, outlier_rows),
        "outlier dimensions": (queries, outlier_dims),
        "hair apart": (queries, near),
        "denormals": (queries * 1e-20, randn(n, d) * 1e-22),
        "denormal items": (queries * 1e30, randn(n, d) * 1e-42),
        "overflow": (queries.clamp(-3, 3) * 1e38, wild),
        "huge": (queries * 1e19, randn(n, d) * 1e19),
        "one-hot": (queries, torch.eye(d).repeat(n // d + 1, 1)[:n]),
    }


@pytest.mark.parametrize("name", hard_cases())
def test_hard_data_is_exact(name: str) -> None:
    queries, items = hard_cases()[name]
    check_all(queries, items, 12)
    check_all(queries, items, 12, random_seen(len(items), len(queries), 50))


def test_rows_exactly_at_the_bound() -> None:
    """Rows built so that the coding error points along the query, in either direction."""
    torch.manual_seed(0)
    dim, n = 8, 1024
    query = torch.ones(1, dim)
    # Rotated by the Hadamard map, a multiple of ones is one entry; half-integers round worst.
    codes = torch.randint(-60, 60, (n, dim)).double() + 0.5
    codes[:, 0] = 100 + torch.randint(0, 2, (n,)) * 0.5
    codes[::16, 1] = 127
    hadamard = torch.tensor([[1.0]], dtype=torch.float64)
    while len(hadamard) < dim:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    items = (codes @ hadamard).float()
    check_all(query, items, 30)
    check_all(torch.cat([query, -query, items[:3]]), items, 30)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    n=st.integers(1, 900),
    dim=st.integers(1, 40),
    batch=st.integers(1, 9),
    k=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e15]),
    levels=st.sampled_from([1, 2, 5, 1000]),
)
def test_any_data(
    data: st.DataObject, n: int, dim: int, batch: int, k: int, scale: float, levels: int
) -> None:
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    items = torch.randint(-levels, levels + 1, (n, dim), generator=g) * scale
    queries = torch.randint(-levels, levels + 1, (batch, dim), generator=g) * 0.37
    items *= torch.rand(n, 1, generator=g) ** data.draw(st.integers(0, 8))
    seen = SeenItems.from_lists(
        torch.randint(n, (int(torch.randint(0, 30, (1,), generator=g)),), generator=g).tolist()
        for _ in range(batch)
    )
    check_all(queries, items, k, data.draw(st.sampled_from([None, seen])))


def test_threads_and_batch_splits_change_nothing() -> None:
    torch.manual_seed(0)
    items = torch.randint(-1, 2, (9000, 16)).float()  # massive ties
    queries, seen = torch.randint(-1, 2, (200, 16)).float(), random_seen(9000, 200, 300)
    index, before = ItemIndex(items), torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(index.search(queries, 25, seen))
            parts = [slice(0, 1), slice(1, 70), slice(70, 200)]
            split = [index.search(queries[p], 25, seen[p]) for p in parts]
            answers.append(
                TopK(torch.cat([a.values for a in split]), torch.cat([a.indices for a in split]))
            )
    finally:
        torch.set_num_threads(before)
    for answer in answers[1:]:
        assert_same(answer, answers[0])


def test_item_parallel_schedule_is_exact() -> None:
    torch.manual_seed(0)
    items, queries = torch.randn(40_000, 32), torch.randn(3, 32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        got = ItemIndex(items).search(queries, 20)
    finally:
        torch.set_num_threads(before)
    assert_same(got, brute_force(queries, items, 20))


def test_flushed_denormals_do_not_matter() -> None:
    queries, items = hard_cases()["denormals"]
    expected = brute_force(queries, items, 12)
    torch.set_flush_denormal(True)
    try:
        got = [topk_retrieve(queries, c, 12) for c in (items, ItemIndex(items))]
    finally:
        torch.set_flush_denormal(False)
    for answer in got:
        assert_same(answer, expected)


def test_few_exact_scores_are_needed() -> None:
    """The point of the prefilter: random, clustered, skewed and outlier-ridden data alike."""
    torch.manual_seed(0)
    n, dim, k = 20_000, 64, 20
    unit = torch.nn.functional.normalize(torch.randn(n, dim), dim=1)
    spread = unit.clone()
    spread[:, 5] *= 100
    tables = {
        "random": (unit, 4),
        "skewed": (unit * torch.randn(n, 1).exp(), 4),
        "outlier dimension": (spread, 15),  # two threads, each with a threshold of its own
        "common part": (0.1 * unit + unit[:1], 4),
    }
    queries = torch.randn(16, dim)
    for name, (items, limit) in tables.items():
        index = ItemIndex(items)
        index.search(queries, k)
        assert index.stats().queries == 16
        assert index.stats().rescored_per_query < limit * k, name


@pytest.mark.parametrize(("n", "k"), [(511, 3), (1000, 100), (1000, 1000)])
def test_small_tables_and_large_k_are_scanned_directly(n: int, k: int) -> None:
    torch.manual_seed(0)
    items, queries = torch.randn(n, 16), torch.randn(3, 16)
    index = ItemIndex(items)
    assert_same(index.search(queries, k), brute_force(queries, items, k))
    assert index.stats().rescored_per_query == n


def test_several_threads_and_indexes_at_once() -> None:
    torch.manual_seed(0)
    work = []
    for n in (1500, 2500):
        items, queries = torch.randn(n, 16), torch.randn(20, 16)
        work.append((ItemIndex(items), queries, brute_force(queries, items, 10)))
    failures: list[BaseException] = []

    def search(index: ItemIndex, queries: Tensor, expected: TopK) -> None:
        try:
            for _ in range(20):
                assert_same(index.search(queries, 10), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search, args=job) for job in work * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_numpy_and_strides_are_accepted() -> None:
    torch.manual_seed(0)
    items, queries = torch.randn(16, 700), torch.randn(5, 32)
    expected = brute_force(queries[:, ::2], items.T, 9)
    assert_same(topk_retrieve(queries[:, ::2], items.T, 9), expected)
    assert_same(topk_retrieve(queries.numpy()[:, ::2], items.T.numpy(), 9), expected)
    assert_same(ItemIndex(items.T).search(queries[:, ::2], 9), expected)


def test_empty_batch_and_empty_table() -> None:
    got = topk_retrieve(torch.randn(0, 4), torch.randn(9, 4), 3)
    assert got.values.shape == got.indices.shape == (0, 3)
    for items in (torch.empty(0, 4), ItemIndex(torch.empty(0, 4))):
        got = topk_retrieve(torch.randn(2, 4), items, 3)
        assert got.indices.eq(-1).all()
        assert got.values.eq(-torch.inf).all()


def test_everything_excluded() -> None:
    got = topk_retrieve(
        torch.randn(1, 4), torch.randn(9, 4), 3, exclude=SeenItems.from_lists([range(9)])
    )
    assert got.indices.tolist() == [[-1, -1, -1]]


Q, X = torch.ones(2, 4), torch.ones(9, 4)
NAN = torch.tensor([[1.0, torch.nan, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: topk_retrieve(Q, X, 0), ValueError, "k must be at least 1"),
        (lambda: topk_retrieve(Q, X, 2.5), TypeError, "k must be an integer"),
        (lambda: topk_retrieve(Q[0], X, 1), ValueError, r"use queries\[None\]"),
        (lambda: topk_retrieve(Q[:, :3], X, 1), ValueError, "D = 4"),
        (lambda: topk_retrieve(Q.double(), X, 1), TypeError, "queries must be float32"),
        (lambda: topk_retrieve(Q, X.double(), 1), TypeError, "items must be float32, bfloat16"),
        (lambda: topk_retrieve(Q, X[0], 1), ValueError, r"shape \[N, D\]"),
        (lambda: topk_retrieve(Q, X.to("meta"), 1), ValueError, "queries must be on meta"),
        (lambda: topk_retrieve(torch.cat([Q, NAN]), X, 1), ValueError, "queries: row 2 holds NaN"),
        (lambda: topk_retrieve(Q / 0, X, 1), ValueError, "queries: row 0"),
        (lambda: topk_retrieve(Q, NAN, 1), ValueError, "items hold NaN or infinity"),
        (lambda: topk_retrieve(Q, X / 0, 1), ValueError, "items hold NaN or infinity"),
        (lambda: topk_retrieve(Q, X, 1, backend="gpu"), ValueError, "no backend 'gpu'"),
        (lambda: topk_retrieve(Q, X, 1, exclude=[[1]]), TypeError, "SeenItems.from_lists"),
        (
            lambda: topk_retrieve(Q, X, 1, exclude=SeenItems.from_lists([[1]])),
            ValueError,
            "one row a query, 2, got 1",
        ),
        (
            lambda: topk_retrieve(Q, X, 1, exclude=SeenItems.from_lists([[1], [9]])),
            IndexError,
            "items are 0 … 8",
        ),
        (
            lambda: topk_retrieve(Q, X, 1, exclude=SeenItems.from_lists([[-1], []])),
            IndexError,
            "from -1",
        ),
    ],
)
def test_bad_input_is_explained(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_op_passes_opcheck(backend: str) -> None:
    check_topk(backend)
    torch.library.opcheck(torch.ops.deeprec.normalize_rows, (X, "items"))


def test_op_compiles_whole() -> None:
    torch.manual_seed(0)
    items, queries = torch.randn(600, 8), torch.randn(3, 8)
    seen = random_seen(600, 3, 5)
    index = ItemIndex(items)

    def search(queries: Tensor) -> Tensor:
        direct = topk_retrieve(queries * 2, items, 4, exclude=seen)
        found = index.search(queries, 4, seen)
        return direct.values + found.values

    compiled = torch.compile(search, fullgraph=True, backend="eager")
    assert torch.equal(compiled(queries), search(queries))


def test_results_carry_no_gradient_and_calls_are_counted() -> None:
    backends.reset_op_table()
    got = topk_retrieve(Q.clone().requires_grad_(), X, 2)
    assert not got.values.requires_grad
    assert backends.op_table()[("topk_retrieve", "cpu")].calls == 1
    assert "topk_retrieve[cpu]: runs" in backends.explain("topk_retrieve", Q, X)


@pytest.mark.parametrize("led_astray", [1, 16], ids=["one query", "all queries"])
def test_a_sample_that_misleads_is_found_out(led_astray: int) -> None:
    """19 of a query's 20 best rows lie in one block, which a threshold may be guessed from."""
    torch.manual_seed(0)
    n, k, block = 4096, 20, 32
    rows = torch.nn.functional.normalize(torch.randn(n, 24), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(16, 24), dim=1)
    near = queries[:1] + 0.1 * torch.randn(k - 1, 24)
    queries[:led_astray] = queries[:1] + 0.01 * torch.randn(led_astray, 24)
    exact_scores = []
    for first in range(0, 8 * block, block):
        items = rows.clone()
        items[first : first + k - 1] = torch.nn.functional.normalize(near, dim=1)
        index = ItemIndex(items)
        assert_same(index.search(queries, k), brute_force(queries, items, k))
        exact_scores.append(index.stats().rescored)
    assert max(exact_scores) > min(exact_scores) + led_astray * k, "no block was sampled"
