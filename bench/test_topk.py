"""Exact top-k: an index against every exact scan at its best setting.

Data: random directions; clusters (256 directions, noise 0.3); skewed norms (log-normal); and the
item table of a TRM trained here on the packaged data set. Every answer is compared with faiss's
before anything is timed.
"""

from __future__ import annotations

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

from deeprec import ItemIndex, SeenItems

K = 20
BATCHES = (1, 16, 64, 256, 512)
# (items, dimensions, data); 3,668 and 25,612 are catalogues of the method's data sets.
CASES = [
    (3668, 64, "random"),
    (3668, 128, "trained"),
    (25612, 64, "random"),
    (25612, 128, "random"),
    (25612, 128, "clustered"),
    (25612, 128, "skewed"),
    (25612, 384, "random"),
    (1_000_000, 128, "random"),
    (1_000_000, 128, "clustered"),
]


@lru_cache(maxsize=1)
def data(items: int, dim: int, kind: str) -> tuple[Tensor, Tensor]:
    """Items ``[N, D]`` and a batch of queries ``[512, D]``."""
    random = torch.Generator().manual_seed(0)
    if kind == "trained":
        from trained import trained_embeddings

        return trained_embeddings(BATCHES[-1])
    x = torch.randn(items, dim, generator=random)
    q = torch.randn(BATCHES[-1], dim, generator=random)
    if kind == "clustered":
        centers = F.normalize(torch.randn(256, dim, generator=random), dim=1)
        noise = 0.3 / dim**0.5
        x = centers[torch.randint(256, (items,), generator=random)] + noise * x
        q = centers[torch.randint(256, (len(q),), generator=random)] + noise * q
    elif kind == "skewed":
        return x * torch.randn(items, 1, generator=random).exp(), q
    return F.normalize(x, dim=1), F.normalize(q, dim=1)


@lru_cache(maxsize=1)
def indexes(items: int, dim: int, kind: str) -> tuple[ItemIndex, faiss.IndexFlatIP]:
    x = data(items, dim, kind)[0]
    flat = faiss.IndexFlatIP(x.shape[1])
    flat.add(x.numpy())
    return ItemIndex(x), flat


def faiss_search(flat: faiss.IndexFlatIP, q: np.ndarray, threshold: int) -> Any:
    """``threshold`` 1 always takes BLAS; faiss's default takes it from q * d = 128,000 on."""
    faiss.cvar.distance_compute_blas_threshold = threshold
    return flat.search(q, K)


def numpy_search(x: np.ndarray, q: np.ndarray) -> Any:
    scores = q @ x.T
    best = np.argpartition(scores, -K)[:, -K:]
    return np.take_along_axis(scores, best, 1)


def peers(x: Tensor, q: Tensor, flat: faiss.IndexFlatIP) -> dict[str, Callable[[], Any]]:
    half, half_queries = x.bfloat16(), q.bfloat16()
    found: dict[str, Callable[[], Any]] = {
        "faiss": partial(faiss_search, flat, q.numpy(), 20),
        "faiss blas": partial(faiss_search, flat, q.numpy(), 1),
        "torch": lambda: (q @ x.T).topk(K),
        "torch items first": lambda: (x @ q.T).topk(K, dim=0),
        "torch bf16 (inexact)": lambda: (half_queries @ half.T).topk(K),
    }
    # Partial sorts of a [B, N] float matrix; beyond this it only takes memory and minutes.
    if len(x) * len(q) <= 64_000_000:
        found["numpy"] = partial(numpy_search, x.numpy(), q.numpy())
    try:
        from usearch.index import MetricKind, search
    except ImportError:
        return found
    if len(x) * len(q) <= 16_000_000:
        found["usearch"] = lambda: search(
            x.numpy(), q.numpy(), K, MetricKind.IP, exact=True, threads=torch.get_num_threads()
        )
    return found


@pytest.mark.parametrize(("items", "dim", "kind"), CASES)
def test_topk(table: Table, items: int, dim: int, kind: str) -> None:
    if table.short and (items * dim > 25612 * 64 or kind == "trained"):
        pytest.skip("takes too long for --short")
    x, all_queries = data(items, dim, kind)
    items = len(x)
    faiss.omp_set_num_threads(table.threads)
    index, flat = indexes(items, dim, kind)
    for batch in (1, 16) if table.short else BATCHES:
        q = all_queries[:batch].contiguous()
        answer = index.search(q, K)
        values = torch.from_numpy(faiss_search(flat, q.numpy(), 1)[0])
        torch.testing.assert_close(answer.values, values, rtol=1e-4, atol=1e-5)
        rescored = index.stats().rescored_per_query
        seen = SeenItems.from_padded(torch.randint(items, (batch, 200)), pad=-1)
        result = table.row(
            "topk",
            {"items": f"{items:,}", "D": x.shape[1], "data": kind, "B": batch},
            ours={
                "deeprec": partial(index.search, q, K),
                "deeprec 200 excluded": partial(index.search, q, K, seen),
            },
            peers=peers(x, q, flat),
            operations=2.0 * batch * x.numel(),
            unit="int8_dot",
            bytes_read=x.numel(),
            notes={"re-scored": f"{rescored:.0f}"},
        )
        result["notes"]["fastest peer"] = result["fastest_peer"]
        ms = result["median_ms"]
        result["notes"]["excluded / not"] = f"{ms['deeprec 200 excluded'] / ms['deeprec']:.2f}"
        vector = table.peaks.get("int8_dot_vector")
        if vector:
            rate = 2.0 * batch * x.numel() / (ms["deeprec"] / 1e3)
            result["notes"]["% vector peak"] = f"{100 * rate / vector:.0f}"
