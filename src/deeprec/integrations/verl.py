"""verl: log-probs and entropies from logits, and the fused linear head of PPO.

``FusedLinearForPPO`` (``use_fused_kernels`` with the torch implementation) multiplies 512 tokens
with the whole vocabulary at a time, keeps float32 copies of the result, and once more in the
backward. ``linear_cross_entropy`` (the Triton implementation) needs a GPU in verl; with the patch
it runs wherever :func:`deeprec.linear_logprobs` has a kernel.

Passed on to verl: a vocabulary split over ranks, its summed and averaged reductions, float64,
devices without a kernel of ours.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deeprec.integrations.logprob_calls import (
    counted,
    entropies,
    logprobs,
    why_not_gather,
    why_not_linear,
)
from deeprec.integrations.patching import Peer, Replacement, Usage
from deeprec.ops import linear_logprobs

__all__ = ["PEER"]


def _logprobs_from_logits(original: Any, usage: Usage) -> Any:
    # inplace_backward is about flash-attn's kernel, which this replaces too.
    def logprobs_from_logits(
        logits: Tensor, labels: Tensor, inplace_backward: bool = True
    ) -> Tensor:
        if not counted(usage, why_not_gather(logits)):
            return original(logits, labels, inplace_backward)
        return logprobs(logits, labels)

    return logprobs_from_logits


def _entropy_from_logits(original: Any, usage: Usage) -> Any:
    def entropy_from_logits(logits: Tensor) -> Tensor:
        if not counted(usage, why_not_gather(logits)):
            return original(logits)
        return entropies(logits).to(logits.dtype)

    return entropy_from_logits


def _entropy_from_logits_with_chunking(original: Any, usage: Usage) -> Any:
    def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
        if not counted(usage, why_not_gather(logits)):
            return original(logits, chunk_size)
        return entropies(logits)  # float32, like verl's

    return entropy_from_logits_with_chunking


def _fused_linear_for_ppo(original: Any, usage: Usage) -> Any:
    class FusedLinearForPPOFunction(original):
        """verl's function, with ``apply`` by :func:`deeprec.linear_logprobs`."""

        @classmethod
        def apply(
            cls,
            hidden_states: Tensor,
            vocab_weights: Tensor,
            input_ids: Tensor,
            temperature: float = 1.0,
            chunk_size: int = 512,
        ) -> tuple[Tensor, Tensor]:
            if not counted(usage, why_not_linear(hidden_states, vocab_weights, None)):
                return original.apply(
                    hidden_states, vocab_weights, input_ids, temperature, chunk_size
                )
            values, entropy = linear_logprobs(
                hidden_states, vocab_weights, input_ids, temperature=temperature, entropy=True
            )
            return values, entropy.to(hidden_states.dtype)

    return FusedLinearForPPOFunction


def _linear_cross_entropy(original: Any, usage: Usage) -> Any:
    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float | None = 1.0,
        reduction: str | None = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        reason = why_not_linear(hidden, weight, None)
        if reduction is None or reduction.lower() != "none":
            reason = reason or f"reduction {reduction!r}"
        if dist_process_group is not None:
            reason = reason or "the vocabulary is split over ranks"
        if not counted(usage, reason):
            return original(hidden, weight, labels, temperature, reduction, dist_process_group)
        assert isinstance(temperature, float), f"temperature must be a float, got {temperature!r}"
        flat = hidden.reshape(-1, hidden.shape[-1])
        values, entropy = linear_logprobs(
            flat, weight, labels.reshape(-1), temperature=temperature, entropy=True
        )
        return values, entropy

    return linear_cross_entropy


PEER = Peer(
    distribution="verl",
    supported=">=0.9,<0.10",
    replacements=(
        Replacement(
            "verl.utils.torch_functional",
            "logprobs_from_logits",
            _logprobs_from_logits,
            "deeprec.gather_logprobs",
        ),
        Replacement(
            "verl.utils.torch_functional",
            "entropy_from_logits",
            _entropy_from_logits,
            "deeprec.gather_logprobs",
        ),
        Replacement(
            "verl.utils.torch_functional",
            "entropy_from_logits_with_chunking",
            _entropy_from_logits_with_chunking,
            "deeprec.gather_logprobs",
        ),
        Replacement(
            "verl.utils.experimental.torch_functional",
            "FusedLinearForPPOFunction",
            _fused_linear_for_ppo,
            "deeprec.linear_logprobs",
        ),
        Replacement(
            "verl.utils.kernel.linear_cross_entropy",
            "linear_cross_entropy",
            _linear_cross_entropy,
            "deeprec.linear_logprobs",
        ),
    ),
)
