"""Every constant of the rewards, with the published values as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from deeprec.rollout.protocol import LIST_LENGTH

__all__ = ["ListwiseReward", "RewardConfig", "Stage", "TitleMatch"]

Stage = Literal["cold", "rec"]
ListwiseReward = Literal["hit", "ndcg"]
TitleMatch = Literal["exact", "substring"]


@dataclass(frozen=True)
class RewardConfig:
    """What is paid, and how much.

    ``process`` and ``outcome`` switch the two levels of DeepRec's hierarchical reward (Zheng et
    al., arXiv 2505.16810): stage 1 ("cold") pays the process, stage 2 ("rec") the outcome, and
    the format counts in both. The constants are those of the authors' public code.
    """

    process: bool = False  # tool calls and diversity of the preferences
    outcome: bool = True  # the list: its hit, and its closeness to the target

    format_penalty: float = -1.0  # total format reward as soon as one rule is broken

    # Tool calls: (min(n, max_paid_calls) - 1) * call_reward from the second call on.
    max_paid_calls: int = 3
    call_reward: float = 0.5
    # Diversity: weight * (1 - mean pairwise cosine of the preferences).
    diversity_weight: float = 0.2

    list_size: int = LIST_LENGTH  # items a valid list holds
    # List-wise: hit_base + (list_size - rank) * hit_step at the 0-based rank of the target.
    # "ndcg" pays the same at the top and falls off as 1 / log2(rank + 2), which is what
    # the evaluation measures.
    listwise: ListwiseReward = "hit"
    hit_base: float = 1.0
    hit_step: float = 0.2
    # Point-wise: scale * weighted mean of the items' similarity to the target.
    pointwise_scale: float = 10.0

    # What counts as the target in a list. The authors' code takes the target's title anywhere in
    # the line ("substring": "Alien" is hit by "Aliens") and cuts titles at the first ". ".
    match: TitleMatch = "exact"
    distinct: bool = True  # naming an item twice breaks the format; it does not in their code

    def __post_init__(self) -> None:
        for name, allowed in (("listwise", ListwiseReward), ("match", TitleMatch)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {value!r}")
        for name in ("max_paid_calls", "list_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @classmethod
    def default(cls, stage: Stage, **changes: Any) -> RewardConfig:
        """The recommended rewards of a stage: "cold" (stage 1) or "rec" (stage 2)."""
        if stage not in get_args(Stage):
            raise ValueError(f"stage must be one of {get_args(Stage)}, got {stage!r}")
        return cls(**{"process": stage == "cold", "outcome": stage == "rec", **changes})

    @classmethod
    def paper(cls, stage: Stage) -> RewardConfig:
        """The rewards exactly as the authors' code computes them, its weaknesses included."""
        return cls.default(stage, match="substring", distinct=False)
