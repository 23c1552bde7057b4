"""TRL: selective log-softmax, entropy, and the fused LM head of its trainers.

The trainers of TRL 1.16 (GRPO, RLOO, …) score completions with a fused head that works through
tiles of up to 4096 x 32768 logits, and on a CPU through prompts and padding too. With the patch the
head is :func:`deeprec.linear_logprobs`, and only labelled positions are scored, which TRL does on
GPUs alone. Experimental trainers (CPO, ORPO, SDPO, …) hold logits and
call ``selective_log_softmax``: that becomes :func:`deeprec.gather_logprobs`.

Passed on to TRL: softcapped logits, statistics other than log-prob and entropy (which SFT, DPO
and KTO log), float64, devices without a kernel of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deeprec.integrations.logprob_calls import (
    counted,
    entropies,
    logprobs,
    why_not_gather,
    why_not_linear,
)
from deeprec.integrations.patching import Peer, Replacement, Usage
from deeprec.ops import gather_logprobs, linear_logprobs

__all__ = ["PEER"]

OUR_OUTPUTS = frozenset(("log_probs", "entropy"))


def _selective_log_softmax(original: Any, usage: Usage) -> Any:
    def selective_log_softmax(
        logits: Tensor,
        index: Tensor,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> Tensor:
        if not counted(usage, why_not_gather(logits)):
            return original(logits, index, temperature, row_mask)
        mask = _row_mask(logits, row_mask)
        values = logprobs(logits, index, temperature=temperature, mask=mask)
        if row_mask is not None and mask is None:
            values = values.masked_fill(row_mask == 0, 0.0)
        return values

    return selective_log_softmax


def _selective_log_softmax_and_entropy(original: Any, usage: Usage) -> Any:
    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        reason = why_not_gather(logits)
        if index.ndim != logits.ndim - 1:
            reason = reason or "several tokens a row"
        if not counted(usage, reason):
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        mask = _row_mask(logits, row_mask)
        values, entropy = gather_logprobs(
            logits, index, temperature=temperature, mask=mask, entropy=True
        )
        if not entropy_requires_grad:
            entropy = entropy.detach()
        return values.to(logits.dtype), entropy.to(logits.dtype)

    return selective_log_softmax_and_entropy


def _row_mask(logits: Tensor, row_mask: Tensor | None) -> Tensor | None:
    """TRL's mask as ours, None if it is not one value a row."""
    if row_mask is None or row_mask.shape != logits.shape[:-1]:
        return None
    return row_mask != 0


def _entropy_from_logits(original: Any, usage: Usage) -> Any:
    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        if not counted(usage, why_not_gather(logits)):
            return original(logits, chunk_size)
        return entropies(logits).to(logits.dtype)

    return entropy_from_logits


def _chunked_log_prob(original: Any, usage: Usage) -> Any:
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

    class ChunkedLogProbFunction(original):
        """TRL's function, with ``apply`` by :func:`deeprec.linear_logprobs`."""

        @classmethod
        def apply(
            cls,
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
        ) -> tuple[Tensor | None, ...]:
            reason = why_not_linear(hidden, weight, bias)
            if final_logit_softcapping is not None:
                reason = reason or "softcapped logits"
            if not logit_scale > 0:
                reason = reason or f"logits scaled by {logit_scale}"
            if others := set(outputs) - OUR_OUTPUTS:
                reason = reason or f"asked for {', '.join(sorted(others))}"
            if not counted(usage, reason):
                return original.apply(
                    hidden,
                    weight,
                    bias,
                    targets,
                    temperature,
                    chunk_size,
                    final_logit_softcapping,
                    logit_scale,
                    outputs,
                )
            scored = linear_logprobs(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature / logit_scale,
                entropy="entropy" in outputs,
            )
            values, entropy = scored if isinstance(scored, tuple) else (scored, None)
            return values, entropy, None, None, None

    return ChunkedLogProbFunction


def _counts_only_labels(original: Any, usage: Usage) -> Any:
    """The fused head asks whether to leave out ignored positions: on a CPU too."""

    def _use_triton(device: torch.device) -> bool:
        return device.type == "cpu" or original(device)

    return _use_triton


PEER = Peer(
    distribution="trl",
    supported=">=1.16,<1.17",
    replacements=(
        Replacement(
            "trl.trainer.utils",
            "selective_log_softmax",
            _selective_log_softmax,
            "deeprec.gather_logprobs",
        ),
        Replacement(
            "trl.trainer.utils",
            "selective_log_softmax_and_entropy",
            _selective_log_softmax_and_entropy,
            "deeprec.gather_logprobs",
        ),
        Replacement(
            "trl.trainer.utils",
            "entropy_from_logits",
            _entropy_from_logits,
            "deeprec.gather_logprobs",
        ),
        Replacement(
            "trl.kernels.chunked_logprob",
            "ChunkedLogProbFunction",
            _chunked_log_prob,
            "deeprec.linear_logprobs",
        ),
        # Elsewhere the same function picks TRL's kernels, which must stay as it is.
        Replacement(
            "trl.trainer.utils",
            "_use_triton",
            _counts_only_labels,
            "scoring labelled positions only",
            everywhere=False,
        ),
    ),
)
