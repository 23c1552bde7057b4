"""What a TRM may be asked: arguments checked, made contiguous and named in errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeprec.ops import ItemIndex, SeenItems, TopK
from deeprec.ops.native import as_tensor

__all__ = ["Request", "as_history", "check_exclusions", "search_items"]


@dataclass(frozen=True)
class Request:
    """The tensors of a request: histories with their lengths, or their states, or both."""

    history: Tensor | None  # int64 [B, L]
    lengths: Tensor | None  # int64 [B]
    states: Tensor | None = None  # float32 [B, H]
    preference: Tensor | None = None  # float32 [B, P]

    @classmethod
    def checked(
        cls,
        sizes: Mapping[str, int],
        history: Tensor | np.ndarray | None,
        lengths: Tensor | np.ndarray | None,
        preference: Tensor | np.ndarray | None = None,
        states: Tensor | None = None,
    ) -> Request:
        """The request, once shapes and dtypes fit a TRM of these sizes; values are not looked at.

        Raises TypeError or ValueError, naming the argument.
        """
        ids, counts = None, None
        if history is not None or lengths is not None or states is None:
            ids, counts = as_history(history, lengths, sizes["max_length"])
        count = len(states if ids is None else ids)  # type: ignore[arg-type]
        if states is not None:
            way_out = "history_states gives it"
            states = _matrix("states", states, count, sizes["hidden"], way_out)
        if preference is not None:
            way_out = "use the sentence encoder the TRM was trained with"
            preference = _matrix("preference", preference, count, sizes["text_dim"], way_out)
        asked = cls(ids, counts, states, preference)
        first, *others = (item for item in vars(asked).items() if item[1] is not None)
        for name, tensor in others:
            if tensor.device != first[1].device:
                raise ValueError(
                    f"{name}: expected on {first[1].device} like {first[0]}, got {tensor.device}; "
                    f"use .to({str(first[1].device)!r})"
                )
        return asked

    @property
    def count(self) -> int:
        """Users who ask."""
        rows = self.states if self.history is None else self.history
        assert rows is not None
        return rows.shape[0]

    def given(self) -> list[Tensor]:
        """The tensors whose device decides which backend runs."""
        tensors = (self.history, self.preference, self.states)
        return [tensor for tensor in tensors if tensor is not None]


def as_history(history: Any, lengths: Any, limit: int) -> tuple[Tensor, Tensor]:
    """Item ids ``[B, L]`` and lengths ``[B]``, contiguous; values are not looked at.

    Raises TypeError or ValueError, naming the argument.
    """
    if history is None or lengths is None:
        raise ValueError("history and lengths: expected both, or states without them")
    ids, counts = as_tensor(history), as_tensor(lengths)
    for name, tensor in (("history", ids), ("lengths", counts)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {tensor.dtype}; use .long()")
    if ids.ndim != 2 or not 1 <= ids.shape[1] <= limit:
        raise ValueError(
            f"history: expected item ids [B, L] with L from 1 to {limit}, got shape "
            f"{tuple(ids.shape)}; keep the last {limit} items"
        )
    if counts.shape != ids.shape[:1]:
        raise ValueError(f"lengths: expected shape ({len(ids)},), got {tuple(counts.shape)}")
    return ids.contiguous(), counts.contiguous()


def _matrix(name: str, value: Any, rows: int, columns: int, way_out: str) -> Tensor:
    tensor = as_tensor(value)
    if tensor.shape != (rows, columns):
        raise ValueError(
            f"{name}: expected shape ({rows}, {columns}), got {tuple(tensor.shape)}; {way_out}"
        )
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {tensor.dtype}; use .float()")
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous()


def check_exclusions(asked: Request, exclude: SeenItems | None, exclude_history: bool) -> None:
    """Raise unless exclusions fit the request."""
    if exclude is not None and (not isinstance(exclude, SeenItems) or len(exclude) != asked.count):
        raise ValueError(
            f"exclude: expected a SeenItems of {asked.count} rows, got "
            + (f"{len(exclude)} rows" if isinstance(exclude, SeenItems) else repr(exclude))
        )
    if exclude_history and asked.history is None:
        raise ValueError("exclude_history: needs history and lengths beside states")


def search_items(
    index: ItemIndex,
    users: Tensor,
    asked: Request,
    k: int,
    exclude: SeenItems | None,
    exclude_history: bool,
    backend: str | None = None,
) -> TopK:
    """The ids of the k best rows of an index of items 1…n, and −1 where there are no more.

    Raises IndexError, on a CPU, for an excluded id that is none of these.
    """
    if exclude is not None and exclude.ids.device.type == "cpu" and len(exclude.ids):
        low, high = int(exclude.ids.min()), int(exclude.ids.max())
        if not 1 <= low <= high <= len(index):
            raise IndexError(
                f"exclude: holds ids from {low} to {high}, but items are 1 … {len(index)}"
            )
    found = index.search(users, k, _excluded_rows(asked, exclude, exclude_history), backend=backend)
    return TopK(found.values, torch.where(found.indices < 0, -1, found.indices + 1))


def _excluded_rows(
    asked: Request, exclude: SeenItems | None, exclude_history: bool
) -> SeenItems | None:
    """Rows of the item index: ids less one, of the history as well if asked for."""
    if exclude_history:
        assert asked.history is not None
        seen = SeenItems.from_padded(asked.history)
        exclude = seen if exclude is None else seen.union(exclude.to(seen.ids.device))
    return None if exclude is None else SeenItems(exclude.offsets, exclude.ids - 1)
