"""An item table prepared for exact top-k: 8-bit codes decide which rows need an exact score."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from deeprec import _C
from deeprec.ops import index_file
from deeprec.ops.centers import find_centers, row_norms, stored_order
from deeprec.ops.seen import SeenItems
from deeprec.ops.topk import (
    TopK,
    as_items,
    as_queries,
    check_search,
    item_rows,
    prefilter_view,
    run_cpu,
    topk_for,
)

__all__ = ["IndexStats", "ItemIndex"]

Metric = Literal["ip", "cosine"]
PrefilterChoice = Literal["auto", "none"]

# Sums of code products stay inside int32 up to here.
MAX_CODED_DIM = 65536
# Fewer rows are scanned exactly in any case.
MIN_CODED_ROWS = 512
# 16-bit codes are kept too where a trial search with some of the items leaves this many rows for
# exact scores: such a score takes a row from anywhere in memory, about as long as four codes.
PROBES, PROBE_K, FINE_PAYS = 32, 20, 400
# Places in the list of the prefilter's tensors.
ORDER, CENTER, CLUSTER, FINE, FINE_BOUNDS = (
    list(index_file.TABLE).index(name)
    for name in ("order", "center", "cluster", "fine", "fine_bounds")
)


@dataclass(frozen=True)
class IndexStats:
    """How well the prefilter did in the latest search.

    ``rescored`` is the number of exact scores computed; without a prefilter all of them.
    ``refined`` is the number of rows whose 16-bit codes were looked at before, where there are any.
    """

    queries: int
    rescored: int
    refined: int = 0

    @property
    def rescored_per_query(self) -> float:
        return self.rescored / self.queries if self.queries else 0.0

    @property
    def refined_per_query(self) -> float:
        return self.refined / self.queries if self.queries else 0.0


class ItemIndex:
    """Items ``[N, D]`` to be searched many times, exactly.

    Every row is also kept as 8-bit codes, with a proven bound on what they leave out. A search
    scores codes, and computes an exact score only where the bound cannot exclude a row, so the
    answer is that of :func:`topk_retrieve` bit for bit. The bound holds for any data; how many
    rows it excludes depends on them (:meth:`stats`). So the index looks at its items when it is
    built: rows that lie in clusters are coded about their cluster's center, whole clusters then
    being ruled out unread; where a trial search still leaves many rows, they get 16-bit codes as a
    second level; where all of that excludes too few, the search scans exactly. The method is
    described and proven in ``csrc/cpu/topk_encode.cpp``. :meth:`update` keeps what was decided.

    Items are copied. Searches may run in several threads at once, an update must run alone.

    Args:
        items: ``[N, D]``, float32, bfloat16 or float16, finite.
        metric: "ip", or "cosine": rows and queries are first normalised (in float64, stored as
            float32), and must not be zero.
        prefilter: "auto" builds codes (on the CPU, from a copy of items that are elsewhere, then
            without clusters and second level). They take a byte a dimension and row, three with a
            second level; a million rows of 128 take seconds. "none" always scans exactly.

    Raises:
        TypeError: the dtype does not fit.
        ValueError: the shape, metric or prefilter does not fit, or a row is not finite, or is
            zero under cosine.
    """

    def __init__(
        self,
        items: Tensor | np.ndarray,
        *,
        metric: Metric = "ip",
        prefilter: PrefilterChoice = "auto",
    ) -> None:
        for name, value, choices in (
            ("metric", metric, get_args(Metric)),
            ("prefilter", prefilter, get_args(PrefilterChoice)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        self.metric: Metric = metric
        self.prefilter: PrefilterChoice = prefilter
        self._items = self._stored(as_items(items), "items", copy=True)
        self._table: list[Tensor] | None = None
        self._counts = torch.empty(2, 0, dtype=torch.int64)
        if self._wants_codes():
            self._build()

    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        exclude: SeenItems | None = None,
        *,
        backend: str | None = None,
    ) -> TopK:
        """The k best items of every query ``[B, D]`` (float32), as :func:`topk_retrieve`."""
        asked = as_queries(queries, self._items)
        offsets, ids = check_search(asked, k, exclude)
        if self.metric == "cosine":
            asked = torch.ops.deeprec.normalize_rows(asked, "queries")
        values, indices, self._counts = topk_for(asked)(
            asked, self._items, self._table or [], offsets, ids, k, backend or ""
        )
        return TopK(values, indices)

    def update(self, rows: Tensor | np.ndarray, vectors: Tensor | np.ndarray) -> None:
        """Replace rows ``[M]`` (distinct) by ``vectors`` ``[M, D]`` of the items' dtype.

        Raises IndexError for a row out of range, TypeError or ValueError as the constructor.
        """
        where = torch.as_tensor(rows, device=self._items.device)
        if where.ndim != 1 or where.is_floating_point() or where.dtype == torch.bool:
            raise ValueError(
                f"rows must be integers [M], got {where.dtype} of shape {tuple(where.shape)}"
            )
        where = where.long()
        new = as_items(vectors, "vectors")
        if new.shape != (len(where), self.dim):
            raise ValueError(
                f"vectors must have shape [{len(where)}, {self.dim}], got {tuple(new.shape)}"
            )
        if self.metric == "ip" and new.dtype != self._items.dtype:
            raise TypeError(
                f"vectors must be {self._items.dtype} like the items, got {new.dtype}; "
                f"use .to({self._items.dtype})"
            )
        if len(where) and not 0 <= int(where.min()) <= int(where.max()) < len(self):
            raise IndexError(
                f"rows go from {int(where.min())} to {int(where.max())}, but the items are "
                f"0 … {len(self) - 1}"
            )
        if len(where.unique()) != len(where):
            raise ValueError("rows must be distinct, got duplicates")
        self._items[where] = self._stored(new.to(self._items.device), "vectors")
        if self._table is not None and self._items.device.type != "cpu":
            self._build()
        elif self._table is not None:
            order = self._table[ORDER]
            position = order.argsort()[where] if len(order) else where
            self._encode((position // _block_rows(self._items)).unique())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index as a safetensors file with a version and a checksum."""
        index_file.write(path, self._state(), {"metric": self.metric, "prefilter": self.prefilter})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> ItemIndex:
        """Map a saved index into memory; pages are read when needed and shared between processes.

        ``verify=False`` trusts the content and skips the checksum, which reads the file once.
        Updates stay in memory. Raises ValueError if the file is damaged or of another version.
        """
        tensors, settings = index_file.read(path, verify=verify)
        index = cls.__new__(cls)
        index.metric = settings["metric"]
        index.prefilter = settings["prefilter"]
        index._items = tensors["items"]
        index._table = [tensors[name] for name in index_file.TABLE] if "codes" in tensors else None
        index._counts = torch.empty(2, 0, dtype=torch.int64)
        return index

    def to(self, device: torch.device | str) -> ItemIndex:
        """The same index on another device; itself if it is there already."""
        if torch.device(device) == self._items.device:
            return self
        moved = ItemIndex.__new__(ItemIndex)
        moved.metric, moved.prefilter = self.metric, self.prefilter
        moved._items = self._items.to(device)
        moved._table = None
        if self._table is not None and (len(self._table[CLUSTER]) or len(self._table[FINE])):
            moved._build()
        elif self._table is not None:
            moved._table = [tensor.to(device) for tensor in self._table]
        moved._counts = self._counts[:, :0]
        return moved

    def stats(self) -> IndexStats:
        """Counters of the latest search on this index."""
        rescored, refined = self._counts.sum(1).tolist()
        return IndexStats(self._counts.shape[1], rescored, refined)

    @property
    def dim(self) -> int:
        return self._items.shape[1]

    @property
    def items(self) -> Tensor:
        """The stored rows (normalised under cosine); read only, changed by :meth:`update`."""
        return self._items

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._state().values())

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        coded = "no prefilter"
        if self._table is not None:
            coded = "8- and 16-bit codes" if len(self._table[FINE]) else "8-bit codes"
            if len(self._table[CLUSTER]):
                coded += f" about {len(self._table[CENTER])} centers"
        return (
            f"ItemIndex({len(self)} x {self.dim}, {self._items.dtype}, {self.metric}, {coded}, "
            f"{self.nbytes / 1e6:.1f} MB)"
        )

    # ---- building ----

    def _stored(self, items: Tensor, name: str, *, copy: bool = False) -> Tensor:
        """Rows as the index keeps them: checked, and normalised under cosine."""
        if self.metric == "cosine":
            normalized: Tensor = torch.ops.deeprec.normalize_rows(items, name)
            return normalized
        bad = (~torch.isfinite(row_norms(items, None))).nonzero()
        if len(bad):
            raise ValueError(
                f"{name}: row {int(bad[0])} holds NaN or infinity; every row must be finite"
            )
        if not copy:
            return items
        if items.device.type != "cpu":
            return items.clone()
        return _fresh(*items.shape, dtype=items.dtype).copy_(items)

    def _wants_codes(self) -> bool:
        return (
            self.prefilter == "auto"
            and self._items.device.type != "meta"
            and len(self) >= MIN_CODED_ROWS
            and self.dim <= MAX_CODED_DIM
        )

    def _build(self, *, clusters: bool = True) -> None:
        if self._items.device.type != "cpu":
            host = ItemIndex.__new__(ItemIndex)
            host._items = self._items.cpu()
            host._build(clusters=False)  # kernels elsewhere know one center, one level
            assert host._table is not None
            self._table = [tensor.to(self._items.device) for tensor in host._table]
            return
        with torch.device("cpu"):  # whatever torch's default device is
            self._build_here(clusters)

    def _build_here(self, clusters: bool) -> None:
        centers = find_centers(self._items, clusters=clusters)
        blocks, quads, block_rows = _C.topk_code_shape(len(self), self.dim)
        order, cluster = stored_order(self._items, centers, block_rows)
        self._table = [
            _fresh(blocks, quads, block_rows, 4, dtype=torch.uint8),
            _fresh(blocks, 3, dtype=torch.float32),
            order,
            centers.points,
            cluster,
            _fresh(0, self.dim, dtype=torch.int16),
            _fresh(0, 2, dtype=torch.float32),
        ]
        everything = torch.arange(blocks)
        self._encode(everything)
        if clusters and self._many_left():
            self._table[FINE] = _fresh(len(self), self.dim, dtype=torch.int16)
            self._table[FINE_BOUNDS] = _fresh(blocks, 2, dtype=torch.float32)
            self._encode(everything)

    def _many_left(self) -> bool:
        """Whether the codes leave so many rows to score exactly that finer ones pay."""
        probes = self._items[torch.arange(PROBES) * len(self) // PROBES].float()
        counts = run_cpu(probes, self._items, self._table, None, None, PROBE_K)[2]
        return int(counts[0].sum()) > PROBES * FINE_PAYS

    def _encode(self, blocks: Tensor) -> None:
        _C.topk_encode_blocks(
            item_rows(self._items),
            prefilter_view(self._table),
            blocks.data_ptr(),
            len(blocks),
            torch.get_num_threads(),
        )

    def _state(self) -> dict[str, Tensor]:
        state = {"items": self._items}
        if self._table is not None:
            state |= zip(index_file.TABLE, self._table, strict=True)
        return state


def _fresh(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory not written yet, on huge pages where the system has them."""
    tensor = torch.empty(*shape, dtype=dtype, device="cpu")
    _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _block_rows(items: Tensor) -> int:
    return int(_C.topk_code_shape(*items.shape)[2])
