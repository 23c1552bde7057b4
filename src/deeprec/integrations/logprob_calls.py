"""What the patches of RL libraries share: when deeprec computes a call, and its bookkeeping."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from deeprec import backends
from deeprec.integrations.patching import Usage
from deeprec.ops import gather_logprobs

__all__ = ["counted", "entropies", "logprobs", "why_not_gather", "why_not_linear"]


def counted(usage: Usage, reason: str | None) -> bool:
    """Whether deeprec computes this call, which ``reason`` says why not; counts it either way."""
    if not torch.compiler.is_compiling():  # a counter in a graph would recompile it at every call
        if reason is None:
            usage.taken += 1
        else:
            usage.passed_on[reason] += 1
    return reason is None


def why_not_gather(logits: Tensor) -> str | None:
    """None where a kernel of ours takes these logits, else the reason."""
    return _not_plain(logits) or _no_kernel("gather_logprobs", logits)


def why_not_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None where a kernel of ours takes this linear head, else the reason."""
    if hasattr(weight, "ds_id"):
        return "the head is partitioned by DeepSpeed ZeRO-3"  # its values are gone by the backward
    return _not_plain(hidden, weight, bias) or _no_kernel("linear_logprobs", hidden, weight, bias)


def logprobs(
    logits: Tensor, ids: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Log-probs of the ids, in the logits' dtype."""
    values = gather_logprobs(logits, ids, temperature=temperature, mask=mask)
    assert isinstance(values, Tensor)
    return values.to(logits.dtype)


def entropies(logits: Tensor) -> Tensor:
    """Entropy of every row, float32."""
    nothing = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return gather_logprobs(logits, nothing, entropy=True)[1]


def _not_plain(*tensors: Any) -> str | None:
    """Subclasses such as DTensor hold their data elsewhere."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"the input is a {type(tensor).__name__}"
    return None


def _no_kernel(op: str, *tensors: Any) -> str | None:
    """The peer's own code is preferred to our reference, unless the reference was asked for."""
    chosen = backends.select(op, None, *tensors).name
    if chosen == "reference" and os.environ.get("DEEPREC_BACKEND") != "reference":
        return f"no kernel for {tensors[0].dtype} on {tensors[0].device.type}"
    return None
