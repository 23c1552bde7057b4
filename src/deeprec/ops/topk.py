"""Exact top-k retrieval by inner product: one op for raw tensors and for indexes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops.native import as_tensor
from deeprec.ops.reference import topk as reference
from deeprec.ops.seen import SeenItems
from deeprec.ops.watched import watched

if TYPE_CHECKING:
    from deeprec.ops.index import ItemIndex

__all__ = ["TopK", "topk_retrieve"]

OP = "topk_retrieve"
ITEM_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class TopK(NamedTuple):
    """The best items of every query, best first.

    ``values`` float32 ``[B, k]`` and ``indices`` int64 ``[B, k]``; −inf and −1 where fewer than k
    items are left.
    """

    values: Tensor
    indices: Tensor


def topk_retrieve(
    queries: Tensor | np.ndarray,
    items: Tensor | np.ndarray | ItemIndex,
    k: int,
    *,
    exclude: SeenItems | None = None,
    backend: str | None = None,
) -> TopK:
    """The k items of largest inner product with every query, exactly.

    Scores are float64 dot products of the given values, added in a fixed order and rounded once
    to float32; equal scores are ordered by index. So values and indices are the same, bit for
    bit, on every backend, instruction set, number of threads and split of the batch
    (``deeprec.ops.reference.topk`` spells the order out). Not differentiable.

    Raw items are scanned exactly; build an :class:`ItemIndex` once to be several times faster.

    Args:
        queries: float32 ``[B, D]``, finite.
        items: ``[N, D]``, float32, bfloat16 or float16, finite; or an index, whose metric holds.
        k: at least 1; beyond the items left, answers are padded.
        exclude: item indices not to return, per query.
        backend: "cuda", "triton", "cpu", "reference" or None for the first that can run.

    Returns:
        :class:`TopK`, on the device of the queries.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device, k or backend does not fit, or a value is not finite.
        IndexError: an excluded index is out of range, on a CPU.

    On a GPU no value is checked, because that would wait for the device: a query or item that is
    not finite makes its answer meaningless, an excluded index out of range excludes nothing.
    """
    from deeprec.ops.index import ItemIndex

    if isinstance(items, ItemIndex):
        return items.search(queries, k, exclude, backend=backend)
    table = as_items(items)
    asked = as_queries(queries, table)
    offsets, ids = check_search(asked, k, exclude)
    values, indices, _ = topk_for(asked)(asked, table, None, offsets, ids, k, backend or "")
    return TopK(values, indices)


# ---- checks, shared with ItemIndex ----


def as_items(items: Tensor | np.ndarray, name: str = "items") -> Tensor:
    """``items`` as a contiguous float matrix, or an error that says what it should be."""
    tensor = as_tensor(items).detach()
    if tensor.dtype not in ITEM_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}; use .float()"
        )
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, D] with D > 0, got {tuple(tensor.shape)}")
    return tensor.contiguous()


def as_queries(queries: Tensor | np.ndarray, items: Tensor) -> Tensor:
    """``queries`` as a contiguous float32 matrix that fits ``items``."""
    tensor = as_tensor(queries).detach()
    if tensor.dtype != torch.float32:
        raise TypeError(f"queries must be float32, got {tensor.dtype}; use .float()")
    if tensor.ndim != 2 or tensor.shape[1] != items.shape[1]:
        raise ValueError(
            f"queries must have shape [B, D] with D = {items.shape[1]} like the items, got "
            f"{tuple(tensor.shape)}" + ("; use queries[None] for one" if tensor.ndim == 1 else "")
        )
    if tensor.device != items.device:
        raise ValueError(
            f"queries must be on {items.device} like the items, got {tensor.device}; "
            f"use .to({str(items.device)!r})"
        )
    return tensor.contiguous()


def check_search(
    queries: Tensor, k: int, exclude: SeenItems | None
) -> tuple[Tensor | None, Tensor | None]:
    """The exclusions' tensors, once they and k fit the queries."""
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k must be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if exclude is None:
        return None, None
    if not isinstance(exclude, SeenItems):
        raise TypeError(
            f"exclude must be a SeenItems, got {type(exclude).__name__}; "
            "use SeenItems.from_lists or SeenItems.from_padded"
        )
    if len(exclude) != len(queries):
        raise ValueError(f"exclude must have one row a query, {len(queries)}, got {len(exclude)}")
    if exclude.ids.device != queries.device:
        raise ValueError(
            f"exclude must be on {queries.device} like the queries, got {exclude.ids.device}; "
            f"use exclude.to({str(queries.device)!r})"
        )
    return exclude.offsets.contiguous(), exclude.ids.contiguous()


# ---- the op ----

_LIBRARY = torch.library.Library("deeprec", "FRAGMENT")
# table: none, or the tensors of an index's prefilter (TABLE of index_file.py says which); all but
# codes and bounds may be empty. counts [2, B]: exact scores, and scores by 16-bit codes.
_LIBRARY.define(
    "topk(Tensor queries, Tensor items, Tensor[]? table, Tensor? offsets, Tensor? ids, "
    "SymInt k, str backend) -> (Tensor values, Tensor indices, Tensor counts)"
)
_LIBRARY.define("normalize_rows(Tensor vectors, str name) -> Tensor")


def topk_for(queries: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The op, or its body where nobody looks on."""
    return torch.ops.deeprec.topk if watched(queries) else _topk


def outputs(queries: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    count = queries.shape[0]
    return (
        queries.new_empty(count, k),
        queries.new_empty(count, k, dtype=torch.int64),
        queries.new_zeros(2, count, dtype=torch.int64),
    )


@torch.library.impl(_LIBRARY, "topk", "CompositeExplicitAutograd")
def _topk(
    queries: Tensor,
    items: Tensor,
    table: list[Tensor] | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    k: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # On a GPU these would wait for it; an index checks its items once, when it is built.
    waits = queries.is_cuda
    if (
        not waits
        and ids is not None
        and ids.numel()
        and not 0 <= int(ids.min()) <= int(ids.max()) < items.shape[0]
    ):
        raise IndexError(
            f"exclude holds ids from {int(ids.min())} to {int(ids.max())}, but the items are "
            f"0 … {len(items) - 1}"
        )
    if not waits and table is None and items.numel() and not _all_finite(items):
        raise ValueError("items hold NaN or infinity; every item must be finite")
    chosen = backends.select(OP, backend or None, queries, items, k)
    with backends.timed(OP, chosen.name):
        answer: tuple[Tensor, Tensor, Tensor] = chosen.run(queries, items, table, offsets, ids, k)
    return answer


@torch.library.register_fake("deeprec::topk", lib=_LIBRARY)
def _fake_topk(
    queries: Tensor,
    items: Tensor,
    table: list[Tensor] | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    k: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(queries, k)


def check_finite(name: str, rows: Tensor, each: str = "row") -> None:
    """Raise ValueError for the first of these rows that is not finite."""
    if rows.numel() and not _all_finite(rows):
        row = int((~rows.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{name}: row {row} holds NaN or infinity; every {each} must be finite")


def _all_finite(values: Tensor) -> bool:
    low, high = torch.aminmax(values)  # NaN is passed on, and nothing is stored
    return bool(torch.isfinite(low) & torch.isfinite(high))


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def item_rows(items: Tensor) -> _C.ItemRows:
    """The kernels' view of a contiguous item matrix."""
    return _C.ItemRows(
        items.data_ptr(), items.shape[0], items.shape[1], items.shape[1], ITEM_DTYPES[items.dtype]
    )


def prefilter_view(table: list[Tensor] | None) -> _C.Prefilter:
    """The kernels' view of an index's prefilter; None or [] is without."""
    if not table:
        return _C.Prefilter()
    codes, bounds, order, center, cluster, fine, fine_bounds = table
    return _C.Prefilter(
        codes=pointer(codes),
        bounds=pointer(bounds),
        order=pointer(order),
        center=pointer(center),
        centers=center.shape[0],
        cluster=pointer(cluster),
        fine=pointer(fine),
        fine_bounds=pointer(fine_bounds),
    )


def run_cpu(
    queries: Tensor,
    items: Tensor,
    table: list[Tensor] | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    values, indices, counts = answer = outputs(queries, k)
    batch = queries.shape[0]  # len() of a tensor is a call of Python's
    rescored = counts.data_ptr()
    _C.topk_search(
        item_rows(items),
        prefilter_view(table),
        queries.data_ptr(),
        batch,
        k,
        (pointer(offsets), pointer(ids)),
        (values.data_ptr(), indices.data_ptr(), rescored, rescored + batch * counts.itemsize),
        torch.get_num_threads(),
    )
    return answer


def _run_reference(
    queries: Tensor,
    items: Tensor,
    table: list[Tensor] | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_finite("queries", queries, "query")
    values, indices = reference.topk(queries, items, offsets, ids, k)
    counts = indices.new_zeros(2, len(queries))
    counts[0] = len(items)
    return values, indices, counts


def _why_not_cpu(queries: Tensor, items: Tensor, k: int = 1) -> str | None:
    return None if queries.device.type == "cpu" else f"tensors are on {queries.device}"


backends.register(OP, "cpu", run_cpu, _why_not_cpu)
backends.register(OP, "reference", _run_reference, lambda queries, items, k=1: None)


@torch.library.impl(_LIBRARY, "normalize_rows", "CompositeExplicitAutograd")
def _normalize_rows(vectors: Tensor, name: str) -> Tensor:
    check_finite(name, vectors)
    zero = (vectors == 0).all(1).nonzero()
    if len(zero):
        raise ValueError(
            f"{name}: row {int(zero[0])} is zero, which has no cosine; drop such rows or use "
            'metric="ip"'
        )
    if vectors.device.type != "cpu":
        return reference.normalize_rows(vectors)
    out = torch.empty_like(vectors, dtype=torch.float32)
    _C.topk_normalize_rows(item_rows(vectors), out.data_ptr(), torch.get_num_threads())
    return out


@torch.library.register_fake("deeprec::normalize_rows", lib=_LIBRARY)
def _fake_normalize_rows(vectors: Tensor, name: str) -> Tensor:
    return torch.empty_like(vectors, dtype=torch.float32)
