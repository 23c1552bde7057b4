"""Token log-probs in plain torch: the specification the kernels are tested against.

Differentiable by autograd, on any device; holds the whole ``[rows, vocabulary]`` matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec.ops.allowed import AllowedTokens

__all__ = ["gather_logprobs", "linear_logprobs"]


def gather_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    mask: Tensor | None,
    allowed: AllowedTokens | None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``token_ids`` and the entropy of every row.

    Args:
        logits: ``[rows, vocabulary]``, any float dtype.
        token_ids: int64 ``[rows, K]``.
        temperature: positive divisor of the logits.
        mask: bool ``[rows]``, True = counted; elsewhere results and gradients are 0.
        allowed: the ids each row's softmax is restricted to.

    Returns:
        values ``[rows, K]`` and entropy ``[rows]``; float64 for float64 logits, else float32.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    z = logits.to(dtype) / temperature
    if allowed is not None:
        z = z.masked_fill(~allowed.mask(logits.shape[-1]), float("-inf"))
    if mask is not None:
        # A row that does not count may hold anything, NaN included: it never enters the softmax.
        z = torch.where(mask[:, None], z, torch.zeros_like(z))
        token_ids = torch.where(mask[:, None], token_ids, torch.zeros_like(token_ids))
    # Written out because torch's log_softmax sums long rows naively: at 1e6 entries in float32
    # it is wrong by 6e-5, where the pairwise torch.sum is right to rounding.
    shifted = z - z.detach().amax(-1, keepdim=True)
    logp = shifted - shifted.exp().sum(-1, keepdim=True).log()
    values = logp.gather(-1, token_ids)
    p = logp.exp()
    entropy = -(p * torch.where(p == 0, torch.zeros_like(logp), logp)).sum(-1)
    if mask is not None:
        values = torch.where(mask[:, None], values, torch.zeros_like(values))
        entropy = torch.where(mask, entropy, torch.zeros_like(entropy))
    return values, entropy


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    allowed: AllowedTokens | None,
) -> tuple[Tensor, Tensor]:
    """:func:`gather_logprobs` of ``hidden @ weight.T + bias``, multiplied in float32 or wider.

    Args:
        hidden: ``[rows, H]``.
        weight: ``[vocabulary, H]``.
        token_ids: int64 ``[rows]``.
        bias: ``[vocabulary]``.
        temperature, mask, allowed: as in :func:`gather_logprobs`.

    Returns:
        values and entropy, each ``[rows]``.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        if mask is not None:
            hidden = torch.where(mask[:, None], hidden, torch.zeros_like(hidden))
        logits = hidden.to(dtype) @ weight.to(dtype).T
        if bias is not None:
            logits = logits + bias.to(dtype)
        values, entropy = gather_logprobs(logits, token_ids[:, None], temperature, mask, allowed)
    return values[:, 0], entropy
