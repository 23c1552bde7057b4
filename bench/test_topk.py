"""Exact top-k: an index against every exact scan at its best setting.

Data: random directions; clusters (256 directions, noise 0.3, and 0.05 as "tight"); skewed norms
(log-normal); low rank (8 of D dimensions); and the item table of a TRM trained on the packaged
data set. Every answer is compared with faiss's before anything is timed.

Libraries read some settings from the environment once, so those get a run and a row of their own:
``OPENBLAS_CORETYPE`` and ``OPENBLAS_L2_SIZE`` (NumPy, faiss), ``GLIBC_TUNABLES`` (huge pages for
everybody). A big case is best measured alone: ``-k 1000000x128 --append``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from harness import Table
from torch import Tensor
from torch.nn import functional as F

from deeprec import ItemIndex, SeenItems, TopK

K = 20
BATCHES = (1, 16, 64, 256, 512)
# (items, dimensions, data); 3,668 and 25,612 are catalogues of the method's data sets.
CASES = [
    (3668, 64, "random"),
    (3668, 128, "random"),
    (3668, 384, "random"),
    (2900, 128, "trained"),
    (25612, 64, "random"),
    (25612, 128, "random"),
    (25612, 384, "random"),
    (25612, 128, "clusters"),
    (25612, 128, "skewed"),
    (25612, 128, "low rank"),
    (1_000_000, 64, "random"),
    (1_000_000, 128, "random"),
    (1_000_000, 384, "random"),
    (1_000_000, 128, "clusters"),
    (1_000_000, 128, "tight"),
    (1_000_000, 128, "skewed"),
    (1_000_000, 128, "low rank"),
    (10_000_000, 64, "random"),
]
ENVIRONMENT = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "GLIBC_TUNABLES")
# Scores of a dense [B, N] matrix beyond which a peer that sorts it takes minutes or gigabytes.
MOST_SORTED, MOST_STORED = 64_000_000, 512_000_000
# Multiplications beyond which a peer without a matrix product takes seconds.
MOST_SCANNED = 4_000_000_000


def random_data(items: int, dim: int, kind: str) -> tuple[Tensor, Tensor]:
    """Items ``[N, D]`` and a batch of queries ``[512, D]``."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(items, dim, generator=random)
    q = torch.randn(BATCHES[-1], dim, generator=random)
    if kind in ("clusters", "tight"):
        noise = (0.3 if kind == "clusters" else 0.05) / dim**0.5
        centers = F.normalize(torch.randn(256, dim, generator=random), dim=1)
        x.mul_(noise).add_(centers[torch.randint(256, (items,), generator=random)])
        q = centers[torch.randint(256, (len(q),), generator=random)] + noise * q
    elif kind == "low rank":
        x = x[:, :8] @ torch.randn(8, dim, generator=random)
    elif kind == "skewed":
        return x.mul_(torch.randn(items, 1, generator=random).exp()), q
    return x.div_(x.norm(dim=1, keepdim=True)), F.normalize(q, dim=1)


@lru_cache(maxsize=1)
def prepared(items: int, dim: int, kind: str) -> tuple[Tensor, Tensor, ItemIndex, Any]:
    """Items, queries, our index and faiss's."""
    if kind == "trained":
        from trained import trained_embeddings

        x, q = trained_embeddings(BATCHES[-1])
    else:
        x, q = random_data(items, dim, kind)
    flat = faiss.IndexFlatIP(x.shape[1])
    flat.add(x.numpy())
    return x, q, ItemIndex(x), flat


def faiss_search(flat: Any, q: np.ndarray, threshold: int) -> Any:
    """``threshold`` 1 always takes BLAS; faiss's default takes it from q * d = 128,000 on."""
    faiss.cvar.distance_compute_blas_threshold = threshold
    return flat.search(q, K)


def numpy_search(x: np.ndarray, q: np.ndarray) -> Any:
    scores = q @ x.T
    best = np.argpartition(scores, -K)[:, -K:]
    return np.take_along_axis(scores, best, 1)


def peers(x: Tensor, q: Tensor, flat: Any) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {"faiss blas": partial(faiss_search, flat, q.numpy(), 1)}
    scores = len(x) * len(q)
    if scores * x.shape[1] <= MOST_SCANNED:
        found["faiss"] = partial(faiss_search, flat, q.numpy(), 20)
    if scores <= MOST_STORED:
        found["torch"] = lambda: (q @ x.T).topk(K)
    if scores <= MOST_SORTED:
        half, half_queries = x.bfloat16(), q.bfloat16()
        found["torch items first"] = lambda: (x @ q.T).topk(K, dim=0)
        found["numpy"] = partial(numpy_search, x.numpy(), q.numpy())
        found["torch bf16 (inexact)"] = lambda: (half_queries @ half.T).topk(K)
    if scores * x.shape[1] <= MOST_SCANNED:
        from usearch.index import MetricKind, search

        found["usearch"] = lambda: search(
            x.numpy(), q.numpy(), K, MetricKind.IP, exact=True, threads=torch.get_num_threads()
        )
    return found


def check_excluded(found: TopK, everything: TopK, seen: SeenItems) -> None:
    """Nothing excluded is found, and what is left of the answer without exclusions comes first."""
    for row, items in enumerate(found.indices.tolist()):
        gone = set(seen[row : row + 1].ids.tolist())
        left = [item for item in everything.indices[row].tolist() if item not in gone]
        assert items[: len(left)] == left and not gone & set(items)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("items", "dim", "kind"), CASES, ids=[f"{n}x{d}-{kind}" for n, d, kind in CASES]
)
def test_topk(table: Table, items: int, dim: int, kind: str, batch: int) -> None:
    if table.short and (items * dim > 25612 * 64 or kind == "trained" or batch > 16):
        pytest.skip("takes too long for --short")
    x, queries, index, flat = prepared(items, dim, kind)
    faiss.omp_set_num_threads(table.threads)
    q = queries[:batch].contiguous()
    answer = index.search(q, K)
    values = torch.from_numpy(faiss_search(flat, q.numpy(), 1)[0])
    torch.testing.assert_close(answer.values, values, rtol=1e-4, atol=1e-5)
    rescored = index.stats().rescored_per_query
    random = torch.Generator().manual_seed(1)
    seen = SeenItems.from_padded(torch.randint(len(x), (batch, 200), generator=random), pad=-1)
    check_excluded(index.search(q, K, seen), answer, seen)
    settings = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
    result = table.row(
        "topk",
        {
            "items": f"{len(x):,}",
            "D": x.shape[1],
            "data": kind,
            "B": batch,
            "environment": " ".join(settings) or "plain",
        },
        ours={
            "deeprec": partial(index.search, q, K),
            "deeprec 200 excluded": partial(index.search, q, K, seen),
        },
        peers=peers(x, q, flat),
        operations=2.0 * batch * x.numel(),
        unit="int8_dot",
        bytes_read=x.numel(),
        notes={"re-scored a query": f"{rescored:.0f}"},
    )
    result["notes"]["fastest exact peer"] = result["fastest_peer"]
    ms = result["median_ms"]
    result["notes"]["excluded / not"] = f"{ms['deeprec 200 excluded'] / ms['deeprec']:.2f}"
    vector = table.peaks.get("int8_dot_vector")
    if vector:
        rate = 2.0 * batch * x.numel() / (ms["deeprec"] / 1e3)
        result["notes"]["% vector peak"] = f"{100 * rate / vector:.0f}"
