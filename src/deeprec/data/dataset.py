"""A data set in memory: users' item sequences in time order, and its leave-one-out splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from deeprec.data.catalog import Catalog
from deeprec.data.report import LoadReport
from deeprec.data.requests import Int64Array, Requests

__all__ = ["HELD_OUT", "Dataset", "Sequences", "Split"]

Split = Literal["rl", "valid", "test"]

# Distance of each split's target from the end of a user's sequence. The item before the two
# usual ones is held out for reinforcement learning, so that the recommender which answers there
# has never seen its target.
_FROM_END: dict[Split, int] = {"rl": 3, "valid": 2, "test": 1}
HELD_OUT = max(_FROM_END.values())


class Sequences(NamedTuple):
    """Item sequences in CSR form: user u's are ``items[offsets[u]:offsets[u + 1]]``."""

    offsets: Int64Array
    """[U + 1]"""
    items: Int64Array
    """[M] item ids, oldest first"""
    timestamps: Int64Array
    """[M] unix seconds"""


@dataclass(frozen=True)
class Dataset:
    """Interactions of U users with the items of ``catalog``, in time order; all arrays int64.

    offsets: [U + 1]; user u's interactions are rows ``offsets[u]:offsets[u + 1]``, at least 4.
    items: [M] item ids in 1..n_items, oldest first; a user has each item once.
    timestamps: [M] unix seconds.
    """

    catalog: Catalog
    offsets: Int64Array
    items: Int64Array
    timestamps: Int64Array
    report: LoadReport

    @property
    def n_users(self) -> int:
        """Number of users; user numbers run from 0 to this number, exclusive."""
        return len(self.offsets) - 1

    def requests(
        self, split: Split, users: npt.ArrayLike | None = None, max_history: int = 20
    ) -> Requests:
        """One request a user: predict the held-out item of ``split`` from everything before it.

        The last item of a user is the target of "test", the one before of "valid", the one before
        that of "rl". Histories are cut to the ``max_history`` items just before the target.
        ``users`` [B] picks users, in that order; None means all.

        Raises ValueError for an unknown split or an empty history, IndexError for an unknown user.
        """
        if split not in _FROM_END:
            raise ValueError(f"split must be one of {', '.join(_FROM_END)}, got {split!r}")
        return self.requests_at(
            self.offsets[self._users(users) + 1] - _FROM_END[split], max_history
        )

    def requests_at(self, rows: Int64Array, max_history: int = 20) -> Requests:
        """The requests whose targets are these rows [B] of ``items``, in that order.

        Raises ValueError when a target is its user's first item: its history would be empty;
        IndexError for a row that does not exist.
        """
        if max_history < 1:
            raise ValueError(f"max_history must be at least 1, got {max_history}")
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.items)):
            raise IndexError(
                f"rows must be in 0..{len(self.items) - 1}, got {rows.min()}..{rows.max()}"
            )
        users = np.searchsorted(self.offsets, rows, side="right") - 1
        lengths = np.minimum(rows - self.offsets[users], max_history)
        if len(rows) and lengths.min() < 1:
            raise ValueError("rows: a user's first item has no history and cannot be a target")
        steps = np.arange(max_history)
        real = steps < lengths[:, None]
        source = np.where(real, (rows - lengths)[:, None] + steps, 0)
        return Requests(
            users=users,
            history=np.where(real, self.items[source], 0),
            lengths=lengths,
            targets=self.items[rows],
            timestamps=self.timestamps[rows],
            history_timestamps=np.where(real, self.timestamps[source], 0),
        )

    def train_slice(self, user: int, held_out: int = HELD_OUT) -> slice:
        """Rows of ``items`` and ``timestamps`` of a user, without the last ``held_out``.

        3 stops before the "rl" target, 2 before "valid", 1 before "test".
        """
        (row,) = self._users([user])
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]) - _checked(held_out))

    def train(self, held_out: int = HELD_OUT) -> Sequences:
        """All users' sequences without their last ``held_out`` items (see :meth:`train_slice`)."""
        ends = self.offsets[1:] - _checked(held_out)
        lengths = ends - self.offsets[:-1]
        position = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))
        kept = position < np.repeat(lengths, np.diff(self.offsets))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Sequences(offsets, self.items[kept], self.timestamps[kept])

    def _users(self, users: npt.ArrayLike | None) -> Int64Array:
        if users is None:
            return np.arange(self.n_users, dtype=np.int64)
        rows = np.asarray(users, dtype=np.int64).reshape(-1)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.n_users):
            raise IndexError(
                f"users must be in 0..{self.n_users - 1}, got {rows.min()}..{rows.max()}"
            )
        return rows


def _checked(held_out: int) -> int:
    if not 0 <= held_out <= HELD_OUT:
        raise ValueError(f"held_out must be in 0..{HELD_OUT}, got {held_out}")
    return held_out
