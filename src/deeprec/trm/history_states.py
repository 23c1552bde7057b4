"""States of histories kept between the turns of conversations."""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec.trm.packed import PackedTRM
from deeprec.trm.request import as_history

__all__ = ["HistoryStates"]

# 65,536 states of 128 floats are 32 MB.
CAPACITY = 65536


class HistoryStates:
    """What a packed TRM makes of histories, found again by content.

    A history does not change between the turns of a conversation, nor between the samples of a
    prompt: it is encoded once. States of a pack are forgotten as soon as another one asks, so
    training the TRM cannot leave them stale.

    Args:
        capacity: states kept; once it is reached, all are forgotten.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._packed: PackedTRM | None = None
        self._rows: dict[bytes, int] = {}
        self._states = torch.empty(0, 0)

    def __len__(self) -> int:
        """Histories known."""
        return len(self._rows)

    def of(self, packed: PackedTRM, history: Tensor, lengths: Tensor) -> Tensor:
        """:meth:`PackedTRM.history_states`, of unknown histories only; float32 ``[B, H]``."""
        history, lengths = as_history(history, lengths, packed.sizes["max_length"])
        if not len(history):
            return packed.history_states(history, lengths)
        ids = history.cpu().numpy()
        keys = [row[:n].tobytes() for row, n in zip(ids, lengths.tolist(), strict=True)]
        unknown = {key: row for row, key in enumerate(keys) if key not in self._rows}
        if self._packed is not packed or len(self) + len(unknown) > self.capacity:
            self._packed = packed
            self._rows.clear()
            unknown = {key: row for row, key in enumerate(keys)}
        if unknown:
            rows = torch.tensor(list(unknown.values()), device=history.device)
            self._append(packed.history_states(history[rows], lengths[rows]))
            self._rows |= {key: row for row, key in enumerate(unknown, start=len(self))}
        where = torch.tensor([self._rows[key] for key in keys], device=self._states.device)
        return self._states[where.long()]

    def _append(self, new: Tensor) -> None:
        start, end = len(self), len(self) + len(new)
        if self._states.shape[1:] != new.shape[1:] or self._states.device != new.device:
            self._states = new.new_empty(0, new.shape[1])
        if end > len(self._states):  # room for twice as many, so that growing costs little
            grown = new.new_empty(max(end, 2 * len(self._states)), new.shape[1])
            grown[:start] = self._states[:start]
            self._states = grown
        self._states[start:end] = new
