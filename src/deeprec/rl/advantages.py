"""Advantage estimators: pure functions from returns to advantages.

All take ``returns`` float64 [n, S], the return of each of S segments of n trajectories,
``groups`` int64 [n], which trajectories share a prompt, and ``tokens`` int64 [n, S], how many
policy tokens a segment holds (0: the trajectory has no such segment, its return is never read),
and give float64 [n, S], 0 where there are no tokens. One return for a whole trajectory is S = 1.
A new estimator is a function with the decorator :func:`register`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ADVANTAGES",
    "AdvantageFunction",
    "center",
    "dr_grpo",
    "get_advantage",
    "grpo",
    "register",
    "reinforce_baseline",
    "rloo",
    "whiten",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
AdvantageFunction = Callable[[FloatArray, IntArray, IntArray], FloatArray]

ADVANTAGES: dict[str, AdvantageFunction] = {}

CENTERED_LIMIT = 10.0  # DeepRec's bound on a centred reward: one outlier must not set the scale
STD_FLOOR = 1e-6  # equal returns leave only rounding, which must not be blown up to unit size
GRPO_EPSILON = 1e-4  # added to the standard deviation, as in TRL


def register(name: str) -> Callable[[AdvantageFunction], AdvantageFunction]:
    """Make an estimator available to ``RLConfig(advantage=name)``."""

    def add(function: AdvantageFunction) -> AdvantageFunction:
        if name in ADVANTAGES:
            raise ValueError(f"advantage {name!r} is registered twice")
        ADVANTAGES[name] = function
        return function

    return add


def get_advantage(name: str) -> AdvantageFunction:
    """The estimator called ``name``; ValueError names the known ones."""
    if name not in ADVANTAGES:
        raise ValueError(f"advantage: expected one of {', '.join(ADVANTAGES)}, got {name!r}")
    return ADVANTAGES[name]


def _group_sum(values: FloatArray, groups: IntArray) -> FloatArray:
    """Sum of ``values`` [n, S] over each row's group, given back to every row of the group."""
    _, group = np.unique(groups, return_inverse=True)
    sums = np.zeros((int(group.max(initial=-1)) + 1, values.shape[1]))
    np.add.at(sums, group, values)
    return sums[group]


def center(returns: FloatArray, groups: IntArray, tokens: IntArray) -> FloatArray:
    """Returns minus their group's mean, segment by segment."""
    present = (tokens > 0).astype(np.float64)
    filled = np.where(tokens > 0, returns, 0.0)
    mean = _group_sum(filled, groups) / np.maximum(_group_sum(present, groups), 1.0)
    return (filled - mean) * present


def whiten(advantages: FloatArray, tokens: IntArray) -> FloatArray:
    """Mean 0 and variance 1 over all tokens, each segment counted once a token."""
    total = tokens.sum()
    if total == 0:
        return np.zeros_like(advantages)
    mean = (advantages * tokens).sum() / total
    centered = np.where(tokens > 0, advantages - mean, 0.0)
    variance = (centered**2 * tokens).sum() / total
    return centered / max(float(np.sqrt(variance)), STD_FLOOR)


@register("reinforce++_baseline")
def reinforce_baseline(returns: FloatArray, groups: IntArray, tokens: IntArray) -> FloatArray:
    """REINFORCE++ with baseline: centred by group, clipped to ±10, whitened over all tokens.

    Hu et al., "REINFORCE++" (arXiv 2501.03262); DeepRec, section 4.
    """
    centered = np.clip(center(returns, groups, tokens), -CENTERED_LIMIT, CENTERED_LIMIT)
    return whiten(centered, tokens)


@register("grpo")
def grpo(returns: FloatArray, groups: IntArray, tokens: IntArray) -> FloatArray:
    """Centred and divided by the group's standard deviation (Shao et al., arXiv 2402.03300)."""
    centered = center(returns, groups, tokens)
    count = _group_sum((tokens > 0).astype(np.float64), groups)
    variance = _group_sum(centered**2, groups) / np.maximum(count - 1.0, 1.0)
    return centered / (np.sqrt(variance) + GRPO_EPSILON)


@register("rloo")
def rloo(returns: FloatArray, groups: IntArray, tokens: IntArray) -> FloatArray:
    """Return minus the mean of the group's other samples (Ahmadian et al., arXiv 2402.14740).

    A sample alone in its group has advantage 0.
    """
    count = _group_sum((tokens > 0).astype(np.float64), groups)
    return center(returns, groups, tokens) * count / np.maximum(count - 1.0, 1.0)


@register("dr_grpo")
def dr_grpo(returns: FloatArray, groups: IntArray, tokens: IntArray) -> FloatArray:
    """Centred only: no division that favours easy prompts (Liu et al., arXiv 2503.20783).

    The paper's other half, no length normalisation within a sequence, is
    ``LossConfig(aggregate="token")``.
    """
    return center(returns, groups, tokens)
