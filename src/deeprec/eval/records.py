"""Conversations as JSON records, with titles in place of ids: what people and reports read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deeprec.rewards.rules import ITEM_LIST
from deeprec.rollout.protocol import PREFERENCE_OPEN, THINK_CLOSE

if TYPE_CHECKING:
    from deeprec.data import Catalog
    from deeprec.rollout import Trajectory

__all__ = ["conversation_record"]


def conversation_record(trajectory: Trajectory, catalog: Catalog, system: str) -> dict[str, Any]:
    """One line of ``trajectories.jsonl``.

    ``{"system", "user", "target", "history": [title], "turns": [{"reasoning", "preference",
    "retrieved": [title]}], "closing", "ranked": [title], "finish", "rewards": {...} | None,
    "text"}``; ``closing`` is the reasoning after the last answer. An unknown title is null.
    """

    def titles(items: list[int]) -> list[str | None]:
        return [catalog.title(item) if item > 0 else None for item in items]

    written = ITEM_LIST.split(trajectory.text)
    turns = [
        {
            "reasoning": text.partition(PREFERENCE_OPEN)[0].strip(),
            "preference": turn.preference,
            "retrieved": titles(turn.retrieved),
        }
        for text, turn in zip(written, trajectory.turns, strict=False)
    ]
    return {
        "system": system,
        "user": int(trajectory.user),
        "target": catalog.title(trajectory.target),
        "history": titles(list(trajectory.history)),
        "turns": turns,
        "closing": written[-1].partition(THINK_CLOSE)[0].strip(),
        "ranked": titles(trajectory.ranked),
        "finish": trajectory.finish,
        "rewards": None if trajectory.rewards is None else asdict(trajectory.rewards),
        "text": trajectory.text,
    }
