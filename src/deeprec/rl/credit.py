"""Which reward each token of a trajectory answers for.

A trajectory is cut into segments. ``"sequence"`` credit has one: every policy token gets the
total reward. ``"list_item"`` credit has one for everything before the list (reasoning and
preferences: the total reward) and one for each listed title, which answers only for what it can
still change:

- the return-to-go of the list, i.e. the gains of the titles from its own position on, minus the
  mean return-to-go of the prompt's other lists at that position *that were still open*. A list is
  settled once the target is listed, or when the target was never retrieved: nothing listed then
  can earn anything, so its tokens get no signal instead of the noise of a baseline;
- the format penalty, which a list can still cause. Tool calls and diversity were earned before.

With one reward for all, a hit at the first place credits the other nine titles as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deeprec.rl.advantages import center
from deeprec.rl.batching import choice_mask

if TYPE_CHECKING:
    from deeprec.rewards import Rewards
    from deeprec.rollout import Trajectory

__all__ = ["Credit", "list_item_credit", "sequence_credit"]


@dataclass(frozen=True)
class Credit:
    """Returns by segment, and the segment of every response token.

    ``returns`` float64 [n, S]; ``tokens`` int64 [n, S], tokens of the policy's choice by segment;
    ``segments`` n arrays int64 [response length], -1 at all other tokens.
    """

    returns: NDArray[np.float64]
    tokens: NDArray[np.int64]
    segments: list[NDArray[np.int64]]

    def spread(self, advantages: NDArray[np.float64], row: int) -> NDArray[np.float32]:
        """Advantages [n, S] given to the chosen tokens of trajectory ``row``, in order."""
        segments = self.segments[row]
        return advantages[row, segments[segments >= 0]].astype(np.float32)


def _count(segments: list[NDArray[np.int64]], width: int) -> NDArray[np.int64]:
    counts = np.zeros((len(segments), width), dtype=np.int64)
    for row, segment in enumerate(segments):
        counts[row] = np.bincount(segment[segment >= 0], minlength=width)
    return counts


def sequence_credit(trajectories: Sequence[Trajectory]) -> Credit:
    """Every token of the policy answers for the total reward."""
    segments = [np.where(choice_mask(trajectory), 0, -1) for trajectory in trajectories]
    totals = np.array([_rewards(trajectory).total for trajectory in trajectories])
    return Credit(totals.reshape(-1, 1), _count(segments, 1), segments)


def list_item_credit(
    trajectories: Sequence[Trajectory],
    gains: Sequence[Sequence[float]],
    groups: NDArray[np.int64],
) -> Credit:
    """Every listed title answers for the gains from its position on; see the module's text.

    ``gains[i]`` are the outcome rewards of trajectory i's listed titles in order, ``groups``
    [n] says which trajectories share a prompt.
    """
    width = 1 + max((len(trajectory.list_positions) for trajectory in trajectories), default=0)
    segments = [_segments(trajectory) for trajectory in trajectories]
    tokens = _count(segments, width)
    outcome = np.zeros((len(trajectories), width))
    is_open = np.zeros((len(trajectories), width), dtype=np.int64)
    for row, (trajectory, gain) in enumerate(zip(trajectories, gains, strict=True)):
        if len(gain) != len(trajectory.list_positions):
            raise ValueError(
                f"gains[{row}]: expected one per listed title, {len(trajectory.list_positions)}, "
                f"got {len(gain)}"
            )
        to_go = np.cumsum(np.asarray(gain, dtype=np.float64)[::-1])[::-1]
        outcome[row, 1 : 1 + len(gain)] = to_go
        is_open[row, 1 : 1 + len(gain)] = _open_positions(trajectory, to_go)
    baselined = center(outcome, groups, is_open)
    rewards = [_rewards(trajectory) for trajectory in trajectories]
    returns = baselined + np.array([[reward.format] for reward in rewards])
    returns[:, 0] = [reward.total for reward in rewards]
    return Credit(returns, tokens, segments)


def _rewards(trajectory: Trajectory) -> Rewards:
    if trajectory.rewards is None:
        raise ValueError(
            f"trajectories: the one of user {trajectory.user} has no rewards; "
            "score it with a RewardModel first"
        )
    return trajectory.rewards


def _segments(trajectory: Trajectory) -> NDArray[np.int64]:
    """0 before the list, k for the tokens from the k-th title up to the next one."""
    segments = np.zeros(len(trajectory.response_ids), dtype=np.int64)
    for position in trajectory.list_positions:
        segments[position:] += 1
    segments[~choice_mask(trajectory)] = -1
    return segments


def _open_positions(trajectory: Trajectory, to_go: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each position of the list could still earn something when it was written."""
    if _rewards(trajectory).format < 0:
        return np.zeros(len(to_go), dtype=bool)  # a broken format earns nothing, whatever is listed
    retrieved = {item for turn in trajectory.turns for item in turn.retrieved}
    reachable = trajectory.target in retrieved or trajectory.target in trajectory.ranked
    listed = np.array(
        [trajectory.target in trajectory.ranked[:k] for k in range(len(to_go))], dtype=bool
    )
    # A dense gain (point-wise similarity) is never settled: there is always something left.
    return (to_go != 0.0) | (reachable & ~listed)
