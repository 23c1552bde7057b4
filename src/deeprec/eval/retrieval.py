"""Full-catalogue evaluation of what answers without a conversation: popularity and the TRM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from deeprec.eval.metrics import LIST_SIZE, UserMetrics, evaluate_ranking
from deeprec.eval.popularity import (
    RECENT_DAYS,
    Popularity,
    RecentBlend,
    RecentPopularity,
    best_first,
    tune_recent,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deeprec.data import Requests
    from deeprec.trm import PreferenceAwareTRM

__all__ = [
    "evaluate_popularity",
    "evaluate_recent_popularity",
    "evaluate_trm",
    "evaluate_trm_with_date",
]

# Re-ranked by recent popularity. Deep enough to lift a title that the TRM alone would not show:
# the comparison is to be as strong as the date makes it.
CANDIDATES = 1000
BATCH = 512


def evaluate_popularity(
    popularity: Popularity, requests: Requests, *, exclude_history: bool = True
) -> UserMetrics:
    """Metrics of recommending the most popular items."""
    ranked = np.concatenate(
        [
            popularity.rank(part.history, LIST_SIZE, exclude_history=exclude_history)
            for part in _parts(requests)
        ]
    )
    return evaluate_ranking(ranked, requests.targets, users=requests.users)


def evaluate_trm(
    trm: PreferenceAwareTRM,
    requests: Requests,
    *,
    k: int = LIST_SIZE,
    exclude_history: bool = True,
    preference: torch.Tensor | None = None,
) -> UserMetrics:
    """Metrics of the TRM alone, asked once with ``preference`` [B, P] (None = no preference)."""
    _, ranked = _retrieve(trm, requests, k, exclude_history, preference)
    return evaluate_ranking(ranked, requests.targets, users=requests.users)


def evaluate_recent_popularity(
    requests: Requests,
    validation: Requests,
    *,
    recent: RecentPopularity,
    recent_validation: RecentPopularity,
    exclude_history: bool = True,
) -> tuple[UserMetrics, float]:
    """Metrics of recommending what was popular in the days before the request, and those days.

    Everything else is as in :func:`evaluate_trm_with_date`.
    """

    def evaluate(known: RecentPopularity, asked: Requests, days: float) -> UserMetrics:
        ranked = np.concatenate(
            [
                known.rank(p.timestamps, p.history if exclude_history else None, days, LIST_SIZE)
                for p in _parts(asked)
            ]
        )
        return evaluate_ranking(ranked, asked.targets, users=asked.users)

    def quality(days: float) -> float:
        return float(evaluate(recent_validation, validation, days).values["ndcg@10"].mean())

    days = max(RECENT_DAYS, key=quality)
    return evaluate(recent, requests, days), days


def evaluate_trm_with_date(
    trm: PreferenceAwareTRM,
    requests: Requests,
    validation: Requests,
    *,
    recent: RecentPopularity,
    recent_validation: RecentPopularity,
    exclude_history: bool = True,
) -> tuple[UserMetrics, RecentBlend]:
    """Metrics of the TRM given the request date, and the blend that was tuned.

    Score = cosine + weight * log(1 + interactions in the days before the request), over the
    TRM's first 1000 items. Days and weight are chosen on ``validation`` with
    ``recent_validation``, which must not know the validation targets; ``recent`` must not know
    the test targets.
    """
    scores, items = _retrieve(trm, validation, CANDIDATES, exclude_history)
    blend = tune_recent(scores, items, recent_validation, validation.timestamps, validation.targets)
    scores, items = _retrieve(trm, requests, CANDIDATES, exclude_history)
    scores += blend.weight * recent.log_counts(requests.timestamps, items, blend.days)
    ranked = best_first(scores, items, LIST_SIZE)
    return evaluate_ranking(ranked, requests.targets, users=requests.users), blend


def _retrieve(
    trm: PreferenceAwareTRM,
    requests: Requests,
    k: int,
    exclude_history: bool,
    preference: torch.Tensor | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores and items [B, k]; where fewer items were left, score -inf and item 0."""
    if preference is not None and len(preference) != len(requests):
        raise ValueError(
            f"preference must have one row a request ({len(requests)}), got {len(preference)}"
        )
    k = min(k, trm.config.n_items)
    device = next(trm.parameters()).device
    values, indices = [], []
    for start, part in zip(range(0, len(requests), BATCH), _parts(requests), strict=True):
        found = trm.retrieve(
            torch.from_numpy(part.history).to(device),
            torch.from_numpy(part.lengths).to(device),
            None if preference is None else preference[start : start + BATCH].to(device),
            k,
            exclude_history=exclude_history,
        )
        values.append(found.values.double().cpu().numpy())
        indices.append(found.indices.clamp_min(0).cpu().numpy())
    return np.concatenate(values), np.concatenate(indices)


def _parts(requests: Requests) -> list[Requests]:
    return [requests[start : start + BATCH] for start in range(0, len(requests), BATCH)]
