"""What a step reports of its trajectories, and how long its parts took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
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
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block, waiting for the accelerator at both ends."""
        _synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            _synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def trajectory_sums(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Sums over scored trajectories, to be added to those of other processes."""
    sums: dict[str, float] = {"trajectories": len(trajectories), "dropped": 0}

    def add(name: str, value: float) -> None:
        sums[name] = sums.get(name, 0.0) + value

    for trajectory in trajectories:
        rewards = trajectory.rewards
        assert rewards is not None
        for name in REWARDS:
            add(f"reward/{name}", getattr(rewards, name))
        for rule in rewards.broken_rules:
            add(f"broken/{rule}", 1)
        add(f"finish/{trajectory.finish}", 1)
        add("dropped", trajectory.finish == "too_long")
        add("valid_rate", not rewards.broken_rules)
        add("tool_calls", len(trajectory.turns))
        add("response_tokens", len(trajectory.response_ids))
        add("sampled_tokens", sum(trajectory.policy_mask))
    return sums


def trajectory_means(sums: Mapping[str, float]) -> dict[str, float]:
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
