"""Items a query must not be answered with, such as what the user has already seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deeprec.ops.native import as_tensor

__all__ = ["SeenItems"]


@dataclass(frozen=True)
class SeenItems:
    """Excluded item ids of every query, in compressed sparse rows.

    Query ``b`` is never answered with any of ``ids[offsets[b]:offsets[b + 1]]``, which ascend
    strictly.

    Args:
        offsets: int64 ``[B + 1]``, from 0 to ``len(ids)``, never descending.
        ids: int64 ``[nnz]``.

    Raises:
        TypeError: a tensor is not int64.
        ValueError: shapes, devices, offsets or the order of ids do not fit the above.
    """

    offsets: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("offsets", self.offsets), ("ids", self.ids)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
                raise TypeError(
                    f"{name} must be an int64 tensor, got {getattr(tensor, 'dtype', type(tensor))};"
                    " SeenItems.from_lists builds both"
                )
            if tensor.ndim != 1:
                raise ValueError(f"{name} must have 1 dimension, got shape {tuple(tensor.shape)}")
        if self.offsets.device != self.ids.device:
            raise ValueError(
                f"offsets and ids must share a device, got {self.offsets.device} and "
                f"{self.ids.device}; move both with SeenItems.to(device)"
            )
        if len(self.offsets) == 0:
            raise ValueError("offsets must hold B + 1 values, got none; no query is tensor([0])")
        if not torch.compiler.is_compiling():
            self._check_values()

    def _check_values(self) -> None:
        lengths = self.offsets.diff()
        ends = (int(self.offsets[0]), int(self.offsets[-1]))
        if ends != (0, len(self.ids)) or bool((lengths < 0).any()):
            raise ValueError(
                f"offsets must ascend from 0 to len(ids) = {len(self.ids)}, got "
                f"{ends[0]} … {ends[1]}; SeenItems.from_lists builds them"
            )
        # A step down is fine only where a row starts.
        down = (self.ids[1:] <= self.ids[:-1]).nonzero().flatten() + 1
        if len(down) and not bool(torch.isin(down, self.offsets).all()):
            raise ValueError(
                "ids must ascend strictly within a row; SeenItems.from_lists sorts them and "
                "drops duplicates"
            )

    @classmethod
    def from_lists(cls, rows: Iterable[Iterable[int]]) -> SeenItems:
        """One list of ids a query, in any order, duplicates allowed."""
        offsets, ids = [0], []
        for row in rows:
            ids.extend(sorted(set(row)))
            offsets.append(len(ids))
        return cls(torch.tensor(offsets, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64))

    @classmethod
    def from_padded(cls, history: Tensor | np.ndarray, pad: int = 0) -> SeenItems:
        """Every entry of the integer matrix ``history`` ``[B, L]`` but ``pad``."""
        padded = as_tensor(history)
        if padded.ndim != 2 or padded.is_floating_point() or padded.dtype == torch.bool:
            raise ValueError(
                f"history must be an integer matrix [B, L], got {padded.dtype} of shape "
                f"{tuple(padded.shape)}"
            )
        rows = padded.long().sort(dim=1).values
        keep = rows != pad
        keep[:, 1:] &= rows[:, 1:] != rows[:, :-1]
        offsets = rows.new_zeros(len(rows) + 1)
        torch.cumsum(keep.sum(1), 0, out=offsets[1:])
        return cls(offsets, rows[keep])

    def union(self, other: SeenItems) -> SeenItems:
        """What either excludes, query by query; both have the same queries and device."""
        if len(self) != len(other):
            raise ValueError(f"other must have {len(self)} rows like this, got {len(other)}")
        count = torch.arange(len(self) + 1, device=self.ids.device)
        rows = torch.cat([count[:-1].repeat_interleave(x.offsets.diff()) for x in (self, other)])
        ids = torch.cat([self.ids, other.ids])
        by_id = ids.argsort()
        order = by_id[rows[by_id].argsort(stable=True)]
        rows, ids = rows[order], ids[order]
        new = torch.ones_like(ids, dtype=torch.bool)
        new[1:] = (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])
        return SeenItems(torch.searchsorted(rows[new], count), ids[new])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> SeenItems:
        """A contiguous range of queries, for instance one batch."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows must be contiguous, got step {step}")
        offsets = self.offsets[start : max(start, stop) + 1]
        return SeenItems(offsets - offsets[0], self.ids[offsets[0] : offsets[-1]])

    def to(self, device: torch.device | str) -> SeenItems:
        """The same rows on another device."""
        return SeenItems(self.offsets.to(device), self.ids.to(device))
