"""A batch of "what does this user take next?" questions."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Requests"]

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Requests:
    """B recommendation requests, one user and one target each; all arrays int64.

    users: [B] rows of the data set (0-based).
    history: [B, L] item ids, oldest first, padded with 0 on the right.
    lengths: [B] number of real items in each history, at least 1.
    targets: [B] item id that the user took next.
    timestamps: [B] unix seconds of the target: the date of the request.
    history_timestamps: [B, L] unix seconds of the history, padded like it.
    """

    users: Int64Array
    history: Int64Array
    lengths: Int64Array
    targets: Int64Array
    timestamps: Int64Array
    history_timestamps: Int64Array

    def __post_init__(self) -> None:
        shapes = {field.name: getattr(self, field.name).shape for field in fields(self)}
        rows = len(self.users)
        padded = self.history.shape if self.history.ndim == 2 else (rows, -1)
        if any(
            shape != (padded if name.startswith("history") else (rows,)) or padded[0] != rows
            for name, shape in shapes.items()
        ):
            raise ValueError(
                "expected history and history_timestamps [B, L] and everything else [B], "
                f"got {shapes}"
            )

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, rows: slice | npt.ArrayLike) -> Requests:
        """The requests at a slice, an array of positions or a boolean mask."""
        index: Any = rows if isinstance(rows, slice) else np.atleast_1d(np.asarray(rows))
        if isinstance(index, np.ndarray) and index.size == 0:
            index = index.astype(np.int64)
        return Requests(**{field.name: getattr(self, field.name)[index] for field in fields(self)})
