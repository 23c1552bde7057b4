"""Trajectories to tensors: one micro-batch is what fits a forward pass.

Sequences of similar length share a micro-batch, padded on the right: with causal attention
nothing real looks at the padding, so no mask is needed. Where the attention reads variable
lengths (flash-attn) sequences are packed into one row instead, told apart by position ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeprec.ops import AllowedTokens

if TYPE_CHECKING:
    from deeprec.rollout import Trajectory

__all__ = ["MicroBatch", "TrainSequence", "choice_mask", "collate", "micro_batches"]


def choice_mask(trajectory: Trajectory) -> NDArray[np.bool_]:
    """Which response tokens the policy chose, bool [response length]: what training sees.

    Tokens of the tool are not among them, nor those a constraint left no choice: their log-prob
    is 0 whatever the weights, so they would only water down averages over tokens.
    """
    sampled = np.asarray(trajectory.policy_mask, dtype=bool)
    if not len(sampled) == len(trajectory.allowed) == len(trajectory.response_ids):
        raise ValueError(
            f"trajectory of user {trajectory.user}: {len(trajectory.response_ids)} response tokens "
            f"but {len(sampled)} entries in policy_mask and {len(trajectory.allowed)} in allowed"
        )
    forced = np.array([ids is not None and len(ids) == 1 for ids in trajectory.allowed], dtype=bool)
    return sampled & ~forced


@dataclass
class TrainSequence:
    """One trajectory as training reads it, with p tokens of the policy's choice.

    ``ids`` int64 [prompt + response]; ``positions`` int64 [p], where in ``ids`` those tokens are;
    ``engine`` float32 [p], the log-probs they were sampled with; ``advantages`` float32 [p];
    ``old`` and ``reference`` float32 [p], log-probs of the trainer before the step's first update
    and of the reference policy, None until computed; ``weight``, the share of one token in the
    update's loss.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    engine: NDArray[np.float32]
    allowed: list[tuple[int, ...] | None]
    advantages: NDArray[np.float32]
    old: NDArray[np.float32] | None = None
    reference: NDArray[np.float32] | None = None
    weight: float = 0.0

    @classmethod
    def from_trajectory(
        cls, trajectory: Trajectory, advantages: NDArray[np.float32]
    ) -> TrainSequence:
        """``advantages`` float32, one per token of :func:`choice_mask` in order."""
        if not trajectory.prompt_ids:
            raise ValueError(
                f"trajectory of user {trajectory.user}: the prompt is empty, so its first token "
                "has nothing to be predicted from; start the prompt with a token"
            )
        where = np.flatnonzero(choice_mask(trajectory))
        return cls(
            ids=np.array(trajectory.prompt_ids + trajectory.response_ids, dtype=np.int64),
            positions=where + len(trajectory.prompt_ids),
            engine=np.asarray(trajectory.logprobs, dtype=np.float32)[where],
            allowed=[trajectory.allowed[index] for index in where],
            advantages=advantages,
        )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass over several sequences, N policy tokens in all.

    ``input_ids`` int64 [B, T]; ``position_ids`` int64 [1, T] when packed, else None; ``rows``
    int64 [N], the hidden state in [B * T] that predicts each policy token; ``token_ids`` int64 [N];
    ``engine``, ``advantages``, ``weights`` float32 [N]; ``old``, ``reference`` float32 [N] or None;
    ``lengths`` the number of policy tokens of each sequence, in order.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    rows: Tensor
    token_ids: Tensor
    engine: Tensor
    advantages: Tensor
    weights: Tensor
    old: Tensor | None
    reference: Tensor | None
    allowed: AllowedTokens | None
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> MicroBatch:
        """The same with every tensor on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | AllowedTokens)
        }
        return replace(self, **moved)


def collate(sequences: Sequence[TrainSequence], *, packed: bool) -> MicroBatch:
    """``sequences`` as one micro-batch: one row each, or all in one row when ``packed``."""
    lengths = [len(sequence) for sequence in sequences]
    position_ids: Tensor | None = None
    if packed:
        input_ids = torch.from_numpy(np.concatenate([s.ids for s in sequences])).unsqueeze(0)
        position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        starts = np.cumsum([0, *lengths[:-1]])
    else:
        input_ids = torch.zeros((len(sequences), max(lengths)), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            input_ids[row, : len(sequence)] = torch.from_numpy(sequence.ids)
        starts = np.arange(len(sequences)) * max(lengths)
    rows = [s.positions - 1 + start for s, start in zip(sequences, starts, strict=True)]
    weights = [np.full(len(s.positions), s.weight, dtype=np.float32) for s in sequences]
    allowed = [row for sequence in sequences for row in sequence.allowed]
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        rows=_join(rows),
        token_ids=_join([sequence.ids[sequence.positions] for sequence in sequences]),
        engine=_join([sequence.engine for sequence in sequences]),
        advantages=_join([sequence.advantages for sequence in sequences]),
        weights=_join(weights),
        old=_join_known([sequence.old for sequence in sequences]),
        reference=_join_known([sequence.reference for sequence in sequences]),
        allowed=AllowedTokens.from_lists(allowed) if any(row for row in allowed) else None,
        lengths=tuple(len(sequence.positions) for sequence in sequences),
    )


def micro_batches(
    sequences: Sequence[TrainSequence], *, max_tokens: int, packed: bool
) -> list[list[TrainSequence]]:
    """Sequences grouped by length so that a group's padded size is at most ``max_tokens``.

    Longest first, so that running out of memory shows at once. A sequence longer than
    ``max_tokens`` gets a micro-batch of its own. Packed sequences need no padding.
    """
    groups: list[list[TrainSequence]] = []
    size = 0
    for sequence in sorted(sequences, key=len, reverse=True):
        width = len(sequence) if packed or not groups else len(groups[-1][0])
        if groups and size + width <= max_tokens:
            groups[-1].append(sequence)
            size += width
        else:
            groups.append([sequence])
            size = len(sequence)
    return groups


def _join(arrays: list[NDArray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def _join_known(arrays: list[NDArray[np.float32] | None]) -> Tensor | None:
    known = [array for array in arrays if array is not None]
    return _join(known) if len(known) == len(arrays) else None
