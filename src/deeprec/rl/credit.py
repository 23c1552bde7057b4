"""Which reward each token of a trajectory answers for.

A trajectory is cut into segments. ``"sequence"`` credit has one: every policy token gets the
total reward. ``"list_item"`` credit has one for each decision to ask again or to close (the first
token after each answer, and what leads from the last one to the list), one for each preference,
and one for each listed title. Each answers only for what it can still change:

- a decision, for the total reward, compared with what the prompt's other trajectories made of as
  many answers;
- a preference, for the gains of the listed items that its turn or a later one found. It is settled
  once the target had been found before: asking again could not earn it any more;
- a listed title, for its own gain and, discounted, those after it. A list is settled once the
  target is listed, or when the target was never retrieved: nothing listed then can earn anything;
- everything before the list, for the rewards that are not paid for listed items;
- a listed title, for the format penalty, which a list can still cause.

What is paid for listed items is compared with the prompt's other trajectories at the same place
*that were still open*, and settled ones get no signal instead of the noise of a baseline. With one
reward for all, a hit at the first place credits the other nine titles as much.

With one relevant item a list is best in the order of the probability that each is it, whatever
comes after: at discount 0 every place is its own decision, with the same optimum as at 1 and far
less noise.
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
    discount: float = 1.0,
) -> Credit:
    """Turns and listed titles answer for the gains they led to; see the module's text.

    ``gains[i]`` are the outcome rewards of trajectory i's listed titles in order, ``groups``
    [n] says which trajectories share a prompt. With T turns at most, segments 0…T - 1 are the
    preferences, T…2T the decisions after as many answers less T, and then come the titles;
    ``discount`` is what a title answers of the gain of the next.
    """
    turns = max((len(trajectory.turns) for trajectory in trajectories), default=0)
    titles = 2 * turns + 1
    width = titles + max((len(t.list_positions) for t in trajectories), default=0)
    segments = [_segments(trajectory, turns) for trajectory in trajectories]
    outcome = np.zeros((len(trajectories), width))
    is_open = np.zeros((len(trajectories), width), dtype=np.int64)
    rest = np.zeros((len(trajectories), width))
    for row, (trajectory, gain) in enumerate(zip(trajectories, gains, strict=True)):
        if len(gain) != len(trajectory.list_positions):
            raise ValueError(
                f"gains[{row}]: expected one per listed title, {len(trajectory.list_positions)}, "
                f"got {len(gain)}"
            )
        rewards, paid = _rewards(trajectory), float(sum(gain))
        asked, listed = slice(0, len(trajectory.turns)), slice(titles, titles + len(gain))
        outcome[row, asked] = _gains_of_turns(trajectory, gain)
        outcome[row, listed] = _discounted(gain, discount)
        if rewards.format == 0:  # a broken format earns nothing, whatever is found and listed
            is_open[row, asked] = _open_turns(trajectory, outcome[row, asked])
            is_open[row, listed] = _open_places(trajectory, _discounted(gain, 1.0))
        rest[row, :turns] = rewards.total - paid
        rest[row, turns:titles] = rewards.total
        rest[row, titles:] = rewards.format
    baselined = center(outcome, groups, is_open)
    return Credit(baselined + rest, _count(segments, width), segments)


def _rewards(trajectory: Trajectory) -> Rewards:
    if trajectory.rewards is None:
        raise ValueError(
            f"trajectories: the one of user {trajectory.user} has no rewards; "
            "score it with a RewardModel first"
        )
    return trajectory.rewards


def _segments(trajectory: Trajectory, turns: int) -> NDArray[np.int64]:
    """The segment of each token where there are ``turns`` turns at most, -1 for no choice."""
    sampled, chosen = np.asarray(trajectory.policy_mask, dtype=np.int64), choice_mask(trajectory)
    answers = np.cumsum(np.diff(sampled, prepend=1) == -1)  # begun before each token
    asked = len(trajectory.turns)
    segments = np.where(answers < asked, answers, turns + asked)
    for answer in range(asked):
        first = np.flatnonzero(chosen & (answers == answer))[:1]
        segments[first] = turns + answer
    for number, position in enumerate(trajectory.list_positions):
        segments[position:] = 2 * turns + 1 + number
    segments[~chosen] = -1
    return segments


def _discounted(gain: Sequence[float], discount: float) -> NDArray[np.float64]:
    """Each gain and those after it, every one ``discount`` times its neighbour's weight."""
    to_go = np.asarray(gain, dtype=np.float64).copy()
    for place in range(len(to_go) - 2, -1, -1):
        to_go[place] += discount * to_go[place + 1]
    return to_go


def _gains_of_turns(trajectory: Trajectory, gain: Sequence[float]) -> NDArray[np.float64]:
    """By turn, the gains of the listed items that it or a later turn found first."""
    found_in = {
        item: number
        for number in range(len(trajectory.turns) - 1, -1, -1)
        for item in trajectory.turns[number].retrieved
    }
    by_turn = np.zeros(len(trajectory.turns))
    for item, value in zip(trajectory.ranked, gain, strict=True):
        by_turn[: found_in.get(item, len(by_turn)) + 1] += value
    return by_turn


def _open_turns(trajectory: Trajectory, to_go: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each turn could still earn something when its preference was written."""
    before: set[int] = set()
    unfound = []
    for turn in trajectory.turns:
        unfound.append(trajectory.target not in before)
        before.update(turn.retrieved)
    return (to_go != 0.0) | np.array(unfound, dtype=bool)


def _open_places(trajectory: Trajectory, to_go: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each place of the list could still earn something when it was filled."""
    retrieved = {item for turn in trajectory.turns for item in turn.retrieved}
    reachable = trajectory.target in retrieved or trajectory.target in trajectory.ranked
    listed = np.array(
        [trajectory.target in trajectory.ranked[:k] for k in range(len(to_go))], dtype=bool
    )
    # A dense gain (point-wise similarity) is never settled: there is always something left.
    return (to_go != 0.0) | (reachable & ~listed)
