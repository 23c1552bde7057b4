"""Bootstrap over users: intervals of means and of paired differences.

Percentile intervals (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deeprec.eval.metrics import UserMetrics

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["bootstrap_means", "paired", "summarise"]

RESAMPLES = 5000  # ends of a 95% interval then move by about 1% of its width between seeds
CONFIDENCE = 0.95
CHUNK = 256  # resamples drawn at a time, to bound memory: CHUNK * users indices


def bootstrap_means(
    values: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Means [resamples, M] of ``values`` [U, M] over users drawn with replacement.

    The columns of one resample share their users.
    """
    n_users, _ = values.shape
    if n_users == 0:
        raise ValueError("values must hold at least one user, got none")
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - start)
        drawn = rng.integers(n_users, size=(rows, n_users))
        drawn += np.arange(rows)[:, None] * n_users
        counts = np.bincount(drawn.ravel(), minlength=rows * n_users).reshape(rows, n_users)
        means.append(counts @ values / n_users)
    return np.concatenate(means)


def summarise(
    metrics: UserMetrics, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, float]]:
    """``{metric: {"mean", "low", "high"}}`` with 95% bootstrap intervals."""
    values = np.stack(list(metrics.values.values()), axis=1)
    low, high = _interval(bootstrap_means(values, resamples=resamples, seed=seed))
    means = values.mean(axis=0)
    return {
        name: {"mean": float(means[i]), "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(metrics.values)
    }


def paired(
    first: UserMetrics, second: UserMetrics, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, float]]:
    """``{metric: {"difference", "low", "high", "p", "users"}}`` of ``first`` minus ``second``.

    Users that both evaluated are compared, each with themself. ``p`` is two-sided: twice the
    share of resampled differences on the far side of 0, so it is below 0.05 where the 95%
    interval leaves 0 out.
    """
    users, in_first, in_second = np.intersect1d(first.users, second.users, return_indices=True)
    if len(users) == 0:
        raise ValueError("first and second share no user, so nothing can be paired")
    names = [name for name in first.values if name in second.values]
    differences = np.stack(
        [first.values[name][in_first] - second.values[name][in_second] for name in names], axis=1
    )
    means = bootstrap_means(differences, resamples=resamples, seed=seed)
    low, high = _interval(means)
    # The observed sample counts as one more resample: p is never 0.
    tails = 1 + np.minimum((means <= 0).sum(axis=0), (means >= 0).sum(axis=0))
    p = np.minimum(1.0, 2 * tails / (len(means) + 1))
    observed = differences.mean(axis=0)
    return {
        name: {
            "difference": float(observed[i]),
            "low": float(low[i]),
            "high": float(high[i]),
            "p": float(p[i]),
            "users": float(len(users)),
        }
        for i, name in enumerate(names)
    }


def _interval(means: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high
