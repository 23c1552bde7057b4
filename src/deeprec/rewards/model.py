"""The reward model: scores trajectories, or decoded responses as the authors' code does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deeprec.rewards.config import RewardConfig
from deeprec.rewards.rules import (
    broken_in_text,
    broken_in_trajectory,
    list_lines,
    names_twice,
    written_preferences,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from deeprec.rollout import Trajectory

__all__ = ["RewardModel", "Rewards"]

LINE_NUMBER = re.compile(r"^\s*\d+\s*[.)]\s*")


@dataclass(frozen=True, slots=True)
class Rewards:
    """What one conversation earned: the components, their sum, and the rules it broke.

    A component that the stage does not pay is 0.
    """

    format: float
    tool_calls: float
    diversity: float
    listwise: float
    pointwise: float
    total: float
    broken_rules: tuple[str, ...] = ()


class RewardModel:
    """Rewards of conversations over one catalogue (DeepRec, arXiv 2505.16810).

    ``titles[i]`` is item i + 1. ``text_vectors`` [n_items + 1, P] and ``item_vectors``
    [n_items + 1, H] are indexed by item, row 0 standing for an unknown title; the point-wise
    reward compares listed items with the target in both. ``encode`` turns n preferences into n
    vectors; it is called only when the diversity of preferences is paid and some response wrote
    two. What it raises is passed on: a failure never becomes a reward.

    Arrays or tensors on any device; scores are computed in float64.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        titles: Sequence[str],
        text_vectors: ArrayLike | torch.Tensor,
        item_vectors: ArrayLike | torch.Tensor,
        encode: Callable[[list[str]], Any],
    ) -> None:
        self.config = config
        self.titles = tuple(titles)
        self._text = _matrix("text_vectors", text_vectors, len(self.titles) + 1)
        self._items = _unit_rows(_matrix("item_vectors", item_vectors, len(self.titles) + 1))
        self._encode = encode
        self._exact = {title.strip(): i for i, title in enumerate(self.titles, start=1)}
        self._loose = {title.strip().lower(): i for i, title in enumerate(self.titles, start=1)}

    def score(self, trajectories: Sequence[Trajectory]) -> list[Rewards]:
        """Rewards of trajectories: calls, list and ending as the roll-out recorded them."""
        spoken = [[turn.preference.strip() for turn in t.turns] for t in trajectories]
        scored = []
        for trajectory, diversity in zip(trajectories, self._diversities(spoken), strict=True):
            broken = self._broken(trajectory)
            listwise = pointwise = 0.0
            if self.config.outcome and not broken:
                listwise = sum(self._trajectory_gains(trajectory))
                pointwise = self._pointwise(trajectory.ranked, trajectory.target)
            n_calls = len(trajectory.turns)
            scored.append(self._rewards(broken, n_calls, diversity, listwise, pointwise))
        return scored

    def score_text(
        self, responses: Sequence[str], targets: Sequence[str], tool_calls: Sequence[int]
    ) -> list[Rewards]:
        """Rewards of decoded responses, everything read back from the text.

        ``targets`` are titles, ``tool_calls`` the calls that were answered. ``encode`` gets the
        stripped preferences of one response at a time, two or more.
        """
        if not len(responses) == len(targets) == len(tool_calls):
            raise ValueError(
                "responses, targets and tool_calls must be equally long, got "
                f"{len(responses)}, {len(targets)} and {len(tool_calls)}"
            )
        scored = []
        for response, title, n_calls in zip(responses, targets, tool_calls, strict=True):
            target = self._row(title)
            if target == 0:
                raise ValueError(f"targets holds {title!r}, which is none of the titles")
            lines = list_lines(response)
            rows = [self._row(self._title_in(line)) for line in lines]
            broken = broken_in_text(response, self.config.list_size)
            if self.config.distinct and names_twice(rows):
                broken += ("item_twice",)
            listwise = pointwise = 0.0
            if self.config.outcome and not broken:
                listwise = sum(self._gains([self._hits(line, title) for line in lines]))
                pointwise = self._pointwise(rows, target)
            diversity = self._diversities([written_preferences(response)])[0]
            scored.append(self._rewards(broken, n_calls, diversity, listwise, pointwise))
        return scored

    def list_item_rewards(self, trajectory: Trajectory) -> list[float]:
        """The list-wise reward split over ``trajectory.ranked``: the gain of each listed item.

        Sums to the list-wise reward, so everything is 0 where that is.
        """
        if not self.config.outcome or self._broken(trajectory):
            return [0.0] * len(trajectory.ranked)
        return self._trajectory_gains(trajectory)

    def _rewards(
        self,
        broken: tuple[str, ...],
        n_calls: int,
        diversity: float,
        listwise: float,
        pointwise: float,
    ) -> Rewards:
        config = self.config
        format_reward = config.format_penalty if broken else 0.0
        calls = 0.0
        if config.process and n_calls >= 2:
            calls = (min(n_calls, config.max_paid_calls) - 1) * config.call_reward
        total = format_reward + calls + diversity + listwise + pointwise
        return Rewards(format_reward, calls, diversity, listwise, pointwise, total, broken)

    def _broken(self, trajectory: Trajectory) -> tuple[str, ...]:
        return broken_in_trajectory(trajectory, self.config.list_size, self.config.distinct)

    # Process ----------------------------------------------------------------------------------

    def _diversities(self, preferences: Sequence[list[str]]) -> list[float]:
        """The diversity reward of each conversation, all their preferences encoded in one call."""
        texts = [text for said in preferences if len(said) > 1 for text in said]
        if not self.config.process or not texts:
            return [0.0] * len(preferences)
        vectors = _unit_rows(_matrix("encode(preferences)", self._encode(texts), len(texts)))
        rewards, start = [], 0
        for said in preferences:
            if len(said) < 2:
                rewards.append(0.0)
                continue
            own = vectors[start : start + len(said)].astype(np.float64)
            start += len(said)
            pairs = np.triu_indices(len(own), k=1)
            rewards.append(self.config.diversity_weight * (1 - float((own @ own.T)[pairs].mean())))
        return rewards

    # Outcome ----------------------------------------------------------------------------------

    def _trajectory_gains(self, trajectory: Trajectory) -> list[float]:
        target, ranked = trajectory.target, trajectory.ranked
        n_items = len(self.titles)
        if not 1 <= target <= n_items:
            raise ValueError(f"trajectory.target must be an item 1..{n_items}, got {target}")
        if any(not 0 <= item <= n_items for item in ranked):
            raise ValueError(f"trajectory.ranked must hold items 0..{n_items}, got {ranked}")
        if self.config.match == "exact":
            return self._gains([item == target for item in ranked])
        title = self.titles[target - 1]
        return self._gains([item > 0 and title in self.titles[item - 1] for item in ranked])

    def _gains(self, hits: Sequence[bool]) -> list[float]:
        """The list-wise reward at the first hit, 0 elsewhere."""
        config = self.config
        gains = [0.0] * len(hits)
        if any(hits):
            rank = list(hits).index(True)
            if config.listwise == "hit":
                gains[rank] = config.hit_base + (config.list_size - rank) * config.hit_step
            else:
                top = config.hit_base + config.list_size * config.hit_step
                gains[rank] = top / math.log2(rank + 2)
        return gains

    def _pointwise(self, rows: Sequence[int], target: int) -> float:
        """Scaled mean, weighted towards the top, of the listed items' similarity to the target.

        An item's similarity is the mean of a dot product of the text vectors and a cosine of the
        collaborative ones.
        """
        listed = np.asarray(rows, dtype=np.int64)
        text = self._text[listed].astype(np.float64) @ self._text[target]
        items = self._items[listed].astype(np.float64) @ self._items[target]
        weights = (1 - np.arange(len(listed)) / len(listed)) ** 2
        return self.config.pointwise_scale * float(np.average((text + items) / 2, weights=weights))

    # Titles in text ---------------------------------------------------------------------------

    def _row(self, title: str) -> int:
        """The item of a title, looked up loosely as the point-wise reward does; 0 = unknown."""
        return self._exact.get(title.strip()) or self._loose.get(title.strip().lower(), 0)

    def _title_in(self, line: str) -> str:
        if self.config.match == "substring":
            return line.split(". ", 1)[-1]
        # A title may itself start with a number and a full stop.
        return line if line.strip() in self._exact else LINE_NUMBER.sub("", line, count=1)

    def _hits(self, line: str, title: str) -> bool:
        if self.config.match == "substring":
            return title in line
        return self._title_in(line).strip() == title.strip()


def _matrix(name: str, values: Any, rows: int) -> NDArray[np.float32]:
    """``values`` as a finite float32 matrix of ``rows`` rows."""
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    matrix = np.asarray(values, dtype=np.float32)
    if matrix.ndim != 2 or len(matrix) != rows:
        raise ValueError(f"{name} must be [{rows}, width], got shape {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, but holds NaN or infinity")
    return matrix


def _unit_rows(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows scaled to length 1; zero rows stay zero, so that their cosine is 0."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.asarray(matrix / np.where(norms > 0, norms, 1), dtype=np.float32)
