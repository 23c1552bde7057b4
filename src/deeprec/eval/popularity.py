"""Popularity: of all training interactions, and of the days before a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deeprec.eval.metrics import LIST_SIZE

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["Popularity", "RecentBlend", "RecentPopularity", "best_first", "tune_recent"]

SECONDS_A_DAY = 86_400
# A cosine lies in -1..1 and log(1 + count) in about 0..6, so useful weights are well below 1.
# The windows go down to days: what people watch or buy changes that fast in many data sets.
RECENT_DAYS = (1, 3, 7, 14, 30)
RECENT_WEIGHTS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)


class Popularity:
    """Ranks every item by its number of interactions; ties go to the lower item id."""

    def __init__(self, items: ArrayLike, n_items: int) -> None:
        """``items`` are the item ids 1..n_items of all training interactions."""
        self.counts = np.bincount(_items(items, n_items), minlength=n_items + 1)

    def rank(
        self, history: NDArray[np.int64], k: int, *, exclude_history: bool = True
    ) -> NDArray[np.int64]:
        """The k most popular items [B, k] for ``history`` [B, L] (0 = padding), 0 = none left."""
        scores = np.repeat(self.counts[None].astype(np.float64), len(history), axis=0)
        return _rank_all(scores, history if exclude_history else None, k)


class RecentPopularity:
    """How often each item was taken in the days before a moment.

    Built from interactions that a system may know: leave out what is to be predicted.
    """

    def __init__(self, items: ArrayLike, timestamps: ArrayLike, n_items: int) -> None:
        """``items`` and ``timestamps`` (unix seconds) of the interactions, in any order."""
        times = np.asarray(timestamps, dtype=np.int64)
        ids = _items(items, n_items)
        if ids.shape != times.shape:
            raise ValueError(
                f"items and timestamps must be equally long, got {ids.shape} and {times.shape}"
            )
        order = np.argsort(times, kind="stable")
        self._items, self._times = ids[order], times[order]
        self.n_items = n_items

    def log_counts(
        self, timestamps: NDArray[np.int64], candidates: NDArray[np.int64], days: float
    ) -> NDArray[np.float64]:
        """log(1 + interactions in the ``days`` strictly before ``timestamps`` [B]), [B, C].

        ``candidates`` [B, C] are the items to count.
        """
        start = timestamps - round(days * SECONDS_A_DAY)
        first = np.searchsorted(self._times, start, side="left")
        end = np.searchsorted(self._times, timestamps, side="left")
        counts = np.empty(candidates.shape, dtype=np.float64)
        for row in range(len(candidates)):
            window = self._items[first[row] : end[row]]
            counts[row] = np.bincount(window, minlength=self.n_items + 1)[candidates[row]]
        return np.log1p(counts)

    def rank(
        self,
        timestamps: NDArray[np.int64],
        history: NDArray[np.int64] | None,
        days: float,
        k: int,
    ) -> NDArray[np.int64]:
        """The k items [B, k] taken most often in the ``days`` before ``timestamps`` [B].

        ``history`` [B, L] is left out, None leaves out nothing; 0 = none left.
        """
        everything = np.broadcast_to(
            np.arange(self.n_items + 1), (len(timestamps), self.n_items + 1)
        )
        return _rank_all(self.log_counts(timestamps, everything, days), history, k)


@dataclass(frozen=True)
class RecentBlend:
    """How recent popularity is added to a score: the window in days, and its weight."""

    days: float
    weight: float


def tune_recent(
    scores: NDArray[np.float64],
    candidates: NDArray[np.int64],
    recent: RecentPopularity,
    timestamps: NDArray[np.int64],
    targets: NDArray[np.int64],
) -> RecentBlend:
    """The blend that, added to ``scores`` [B, C] of ``candidates`` [B, C], has the best NDCG@10.

    ``timestamps`` [B] and ``targets`` [B] are those of validation requests.
    """
    best, best_ndcg = RecentBlend(RECENT_DAYS[0], 0.0), -1.0
    for days in RECENT_DAYS:
        logs = recent.log_counts(timestamps, candidates, days)
        for weight in RECENT_WEIGHTS:
            ndcg = _mean_ndcg(scores + weight * logs, candidates == targets[:, None])
            if ndcg > best_ndcg:
                best, best_ndcg = RecentBlend(days, weight), ndcg
    return best


def _mean_ndcg(scores: NDArray[np.float64], is_target: NDArray[np.bool_]) -> float:
    """NDCG@10 from the number of candidates above the target: much faster than sorting."""
    found = is_target.any(axis=1)
    target = np.where(found, scores[np.arange(len(scores)), is_target.argmax(axis=1)], np.inf)
    rank = (scores > target[:, None]).sum(axis=1)
    return float(np.where(found & (rank < LIST_SIZE), 1 / np.log2(rank + 2.0), 0.0).mean())


def best_first(
    scores: NDArray[np.float64], candidates: NDArray[np.int64], k: int
) -> NDArray[np.int64]:
    """The k candidates of highest score [B, k], ties in their given order, 0 where score is -inf.

    ``candidates`` is [B, C] or [1, C].
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(np.broadcast_to(candidates, scores.shape), order, axis=1)
    return np.where(np.isneginf(np.take_along_axis(scores, order, axis=1)), 0, best)


def _rank_all(
    scores: NDArray[np.float64], history: NDArray[np.int64] | None, k: int
) -> NDArray[np.int64]:
    """The k best items [B, k] by ``scores`` [B, n_items + 1], which is written to."""
    if history is not None:
        np.put_along_axis(scores, history, -np.inf, axis=1)
    scores[:, 0] = -np.inf
    return best_first(scores, np.arange(scores.shape[1])[None], k)


def _items(items: ArrayLike, n_items: int) -> NDArray[np.int64]:
    ids = np.asarray(items, dtype=np.int64)
    if ids.size and not (ids.min() >= 1 and ids.max() <= n_items):
        raise ValueError(f"items must be 1..{n_items}, got {int(ids.min())}..{int(ids.max())}")
    return ids
