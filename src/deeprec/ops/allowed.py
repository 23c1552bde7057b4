"""Which tokens a constrained decoder could choose from, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

__all__ = ["AllowedTokens"]


@dataclass(frozen=True)
class AllowedTokens:
    """Permitted token ids of every row, in compressed sparse rows.

    Row ``r`` may be any of ``ids[offsets[r]:offsets[r + 1]]``, strictly ascending; an empty row
    means "no restriction" for that row.

    Args:
        offsets: int64 ``[rows + 1]``, from 0 to ``len(ids)``, never descending.
        ids: int64 ``[nnz]``.

    Raises:
        TypeError: a tensor is not int64.
        ValueError: shapes, devices, offsets or the order of ids do not fit the above.
    """

    offsets: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("offsets", self.offsets), ("ids", self.ids)):
            if tensor.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, got {tensor.dtype}; use .long()")
            if tensor.ndim != 1:
                raise ValueError(f"{name} must have 1 dimension, got shape {tuple(tensor.shape)}")
        if self.offsets.device != self.ids.device:
            raise ValueError(
                f"offsets and ids must share a device, got {self.offsets.device} and "
                f"{self.ids.device}; move both with AllowedTokens.to(device)"
            )
        if len(self.offsets) == 0:
            raise ValueError("offsets must hold rows + 1 values, got none; no rows is tensor([0])")
        if not torch.compiler.is_compiling():
            self._check_values()

    def _check_values(self) -> None:
        lengths = self.offsets.diff()
        ends = (int(self.offsets[0]), int(self.offsets[-1]))
        if ends != (0, len(self.ids)) or bool((lengths < 0).any()):
            raise ValueError(
                f"offsets must ascend from 0 to len(ids) = {len(self.ids)}, got "
                f"{ends[0]} … {ends[1]}; AllowedTokens.from_lists builds them"
            )
        row = torch.repeat_interleave(lengths)
        descends = (self.ids.diff() <= 0) & (row.diff() == 0)
        if bool(descends.any()) or bool((self.ids < 0).any()):
            raise ValueError(
                "ids must be non-negative and strictly ascending within a row; "
                "AllowedTokens.from_lists sorts them and drops duplicates"
            )

    @classmethod
    def from_lists(cls, rows: Iterable[Sequence[int] | None]) -> AllowedTokens:
        """One sequence of ids a row, in any order; None or an empty one is unrestricted."""
        given = [row or () for row in rows]
        lengths = np.array([len(row) for row in given], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(given), np.int64, lengths.sum())
        row = np.repeat(np.arange(len(given)), lengths)
        if ((np.diff(ids) <= 0) & (np.diff(row) == 0)).any():  # not ascending as they should be
            row, ids = np.unique(np.stack([row, ids]), axis=1)
            lengths = np.bincount(row, minlength=len(given))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(torch.from_numpy(offsets), torch.from_numpy(ids))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> AllowedTokens:
        """A contiguous range of rows, for instance one micro-batch."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows must be contiguous, got step {step}")
        offsets = self.offsets[start : max(start, stop) + 1]
        return AllowedTokens(offsets - offsets[0], self.ids[offsets[0] : offsets[-1]])

    def to(self, device: torch.device | str) -> AllowedTokens:
        """The same rows on another device."""
        return AllowedTokens(self.offsets.to(device), self.ids.to(device))

    def mask(self, vocabulary: int) -> Tensor:
        """Dense bool ``[rows, vocabulary]``: True where a token may be chosen."""
        lengths = self.offsets.diff()
        row = torch.repeat_interleave(lengths, output_size=len(self.ids))
        dense = (lengths == 0)[:, None].expand(-1, vocabulary).clone()
        dense[row, self.ids] = True
        return dense
