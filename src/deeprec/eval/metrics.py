"""Leave-one-out ranking metrics, one value a user.

One target a user, full-catalogue ranking: Recall@k is 1 when the target is among the first k
items, NDCG@k is 1 / log2(rank + 2) at its 0-based rank. A user without a valid list is a miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deeprec.rewards import has_valid_list

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from deeprec.rollout import Trajectory

__all__ = ["METRICS", "UserMetrics", "evaluate_ranking", "evaluate_trajectories"]

RECALL_AT = (1, 5, 10)
NDCG_AT = (5, 10)
LIST_SIZE = max(*RECALL_AT, *NDCG_AT)
METRICS = (
    *(f"recall@{k}" for k in RECALL_AT),
    *(f"ndcg@{k}" for k in NDCG_AT),
    "valid_rate",
    "mean_turns",
)


@dataclass(frozen=True)
class UserMetrics:
    """Per-user results of one system: ``values[metric]`` is float64 [U], as are ``users`` int64.

    Users are kept so that two systems are compared on the same people, whatever the order.
    """

    users: NDArray[np.int64]
    values: dict[str, NDArray[np.float64]]

    def __post_init__(self) -> None:
        if len(np.unique(self.users)) < len(self.users):
            raise ValueError("users must be distinct: one ranking a user is evaluated")
        for name, values in self.values.items():
            if values.shape != self.users.shape:
                raise ValueError(
                    f"values[{name!r}] must have shape {self.users.shape}, got {values.shape}"
                )

    def __len__(self) -> int:
        return len(self.users)


def evaluate_ranking(
    ranked: Sequence[Sequence[int]] | NDArray[np.int64],
    targets: ArrayLike,
    *,
    users: ArrayLike | None = None,
    valid: ArrayLike | None = None,
    turns: ArrayLike | None = None,
) -> UserMetrics:
    """Metrics of one ranked list of item ids a user, best first.

    ``ranked`` holds U lists of any length (entries below 1 are no item and never hit),
    ``targets`` [U] item ids. ``users`` [U] defaults to 0..U-1. ``valid`` [U] marks lists that
    count, by default the non-empty ones. ``turns`` [U] are answered tool calls, 0 by default.
    """
    wanted = np.asarray(targets, dtype=np.int64)
    if len(ranked) != len(wanted):
        raise ValueError(f"ranked holds {len(ranked)} lists, targets {len(wanted)}")
    if (wanted < 1).any():
        raise ValueError(f"targets must be items, 1 or higher, got {int(wanted.min())}")
    lists = np.zeros((len(wanted), LIST_SIZE), dtype=np.int64)
    for row, items in zip(lists, ranked, strict=True):
        head = items[:LIST_SIZE]
        row[: len(head)] = head
    counted = (
        np.array([len(items) > 0 for items in ranked], dtype=bool)
        if valid is None
        else np.asarray(valid, dtype=bool)
    )
    hits = (lists == wanted[:, None]) & counted[:, None]
    # Only the first hit counts, so that naming the target twice earns nothing.
    rank = np.where(hits.any(axis=1), hits.argmax(axis=1), LIST_SIZE)
    values = {f"recall@{k}": (rank < k).astype(np.float64) for k in RECALL_AT}
    for k in NDCG_AT:
        values[f"ndcg@{k}"] = np.where(rank < k, 1 / np.log2(rank + 2.0), 0.0)
    values["valid_rate"] = counted.astype(np.float64)
    values["mean_turns"] = (
        np.zeros(len(wanted)) if turns is None else np.asarray(turns, dtype=np.float64)
    )
    identities = np.arange(len(wanted)) if users is None else np.asarray(users, dtype=np.int64)
    return UserMetrics(identities, values)


def evaluate_trajectories(trajectories: Sequence[Trajectory]) -> UserMetrics:
    """Metrics of one conversation a user; what did not end with a valid list is a miss."""
    return evaluate_ranking(
        [t.ranked for t in trajectories],
        [t.target for t in trajectories],
        users=[t.user for t in trajectories],
        valid=[has_valid_list(t) for t in trajectories],
        turns=[len(t.turns) for t in trajectories],
    )
