"""Popularity: of all training interactions, and of the days before a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deeprec.eval.metrics import LIST_SIZE, evaluate_ranking

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["Popularity", "RecentPopularity", "best_first", "tune_recent_weight"]

SECONDS_A_DAY = 86_400
# A cosine lies in -1..1 and log(1 + count) in about 0..6, so useful weights are well below 1.
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
        if exclude_history:
            np.put_along_axis(scores, history, -np.inf, axis=1)
        scores[:, 0] = -np.inf
        return best_first(scores, np.arange(scores.shape[1])[None], k)


class RecentPopularity:
    """How often each item was taken in the days before a moment.

    Built from interactions that a system may know: leave out what is to be predicted.
    """

    def __init__(
        self, items: ArrayLike, timestamps: ArrayLike, n_items: int, *, days: float = 30.0
    ) -> None:
        """``items`` and ``timestamps`` (unix seconds) of the interactions, in any order."""
        times = np.asarray(timestamps, dtype=np.int64)
        ids = _items(items, n_items)
        if ids.shape != times.shape:
            raise ValueError(
                f"items and timestamps must be equally long, got {ids.shape} and {times.shape}"
            )
        order = np.argsort(times, kind="stable")
        self._items, self._times = ids[order], times[order]
        self._seconds = round(days * SECONDS_A_DAY)
        self.n_items = n_items

    def log_counts(
        self, timestamps: NDArray[np.int64], candidates: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """log(1 + interactions in the days strictly before ``timestamps`` [B]) of items [B, C]."""
        first = np.searchsorted(self._times, timestamps - self._seconds, side="left")
        end = np.searchsorted(self._times, timestamps, side="left")
        counts = np.empty(candidates.shape, dtype=np.float64)
        for row in range(len(candidates)):
            window = self._items[first[row] : end[row]]
            counts[row] = np.bincount(window, minlength=self.n_items + 1)[candidates[row]]
        return np.log1p(counts)


def tune_recent_weight(
    scores: NDArray[np.float64],
    candidates: NDArray[np.int64],
    log_counts: NDArray[np.float64],
    targets: NDArray[np.int64],
) -> float:
    """The weight of ``log_counts`` that added to ``scores`` ranks ``targets`` best by NDCG@10.

    All but ``targets`` [B] are [B, C]. Call it on validation requests.
    """

    def ndcg(weight: float) -> float:
        ranked = best_first(scores + weight * log_counts, candidates, LIST_SIZE)
        return float(evaluate_ranking(ranked, targets).values["ndcg@10"].mean())

    return max(RECENT_WEIGHTS, key=ndcg)


def best_first(
    scores: NDArray[np.float64], candidates: NDArray[np.int64], k: int
) -> NDArray[np.int64]:
    """The k candidates of highest score [B, k], ties in their given order, 0 where score is -inf.

    ``candidates`` is [B, C] or [1, C].
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(np.broadcast_to(candidates, scores.shape), order, axis=1)
    return np.where(np.isneginf(np.take_along_axis(scores, order, axis=1)), 0, best)


def _items(items: ArrayLike, n_items: int) -> NDArray[np.int64]:
    ids = np.asarray(items, dtype=np.int64)
    if ids.size and not (ids.min() >= 1 and ids.max() <= n_items):
        raise ValueError(f"items must be 1..{n_items}, got {int(ids.min())}..{int(ids.max())}")
    return ids
