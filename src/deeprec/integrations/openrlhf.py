"""OpenRLHF: log-probs and entropies of its actor.

``Actor.forward`` converts logits to float32, scales them in place, and calls
``log_probs_from_logits`` and, for the entropy bonus, a compiled ``compute_entropy``. Both become
:func:`deeprec.gather_logprobs`. Float64 and devices without a kernel of ours are passed on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deeprec.integrations.logprob_calls import counted, entropies, logprobs, why_not_gather
from deeprec.integrations.patching import Peer, Replacement, Usage

__all__ = ["PEER"]


def _log_probs_from_logits(original: Any, usage: Usage) -> Any:
    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        if not counted(usage, why_not_gather(logits)):
            return original(logits, labels, temperature)
        if temperature != 1.0:
            logits.div_(temperature)  # in place like the original: callers go on with these logits
        return logprobs(logits, labels)

    return log_probs_from_logits


def _compute_entropy(original: Any, usage: Usage) -> Any:
    def compute_entropy(logits: Tensor) -> Tensor:
        if not counted(usage, why_not_gather(logits)):
            return original(logits)
        return entropies(logits).to(logits.dtype)

    return compute_entropy


PEER = Peer(
    distribution="openrlhf",
    supported=">=0.11,<0.12",
    replacements=(
        Replacement(
            "openrlhf.models.utils",
            "log_probs_from_logits",
            _log_probs_from_logits,
            "deeprec.gather_logprobs",
        ),
        Replacement(
            "openrlhf.models.utils",
            "compute_entropy",
            _compute_entropy,
            "deeprec.gather_logprobs",
        ),
    ),
)
