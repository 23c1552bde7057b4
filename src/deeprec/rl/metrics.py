"""What a step reports of its trajectories, and how long its parts took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from deeprec.rollout import Trajectory

__all__ = ["StepClock", "trajectory_means", "trajectory_sums"]

REWARDS = ("total", "format", "tool_calls", "diversity", "listwise", "pointwise")
COUNTS = ("dropped", "broken/", "finish/")  # reported as they are, everything else as a mean


class StepClock:
    """Seconds spent in the named parts of a step."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block, waiting for the accelerator at both ends."""
        _synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            _synchronize()
            self.seconds[name] += time.perf_counter() - start


def trajectory_sums(trajectories: Sequence[Trajectory]) -> Counter[str]:
    """Sums over scored trajectories; those of several processes add up with ``update``."""
    sums: Counter[str] = Counter(trajectories=len(trajectories), dropped=0)
    for trajectory in trajectories:
        rewards = trajectory.rewards
        assert rewards is not None
        sums.update({f"reward/{name}": float(getattr(rewards, name)) for name in REWARDS})
        sums.update(f"broken/{rule}" for rule in rewards.broken_rules)
        sums.update(
            {
                f"finish/{trajectory.finish}": 1,
                "dropped": int(trajectory.finish == "too_long"),
                "valid_rate": int(not rewards.broken_rules),
                "tool_calls": len(trajectory.turns),
                "response_tokens": len(trajectory.response_ids),
                "sampled_tokens": sum(trajectory.policy_mask),
            }
        )
    return sums


def trajectory_means(sums: Counter[str]) -> dict[str, float]:
    """Means per trajectory of rewards and sizes; broken rules, endings and drops as counts."""
    n = max(sums["trajectories"], 1)
    return {
        name: float(value) if name.startswith(COUNTS) else value / n
        for name, value in sorted(sums.items())
        if name != "trajectories"
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
