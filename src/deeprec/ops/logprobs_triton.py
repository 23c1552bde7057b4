"""The Triton backend of gather_logprobs: shapes, strides and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops.gpu import why_not_triton
from deeprec.ops.logprob_checks import check_range, reads_values
from deeprec.ops.logprobs_op import define, empty_outputs

__all__ = ["run", "why_not"]

MAX_ROW = 2**31 - 2**16  # columns are counted in 32 bits, a block beyond the end included


def why_not(logits: Tensor) -> str | None:
    """None where the kernels can run, else the reason."""
    if logits.dtype == torch.float64:
        return "logits are float64, which only the reference computes"
    if logits.shape[-1] > MAX_ROW:
        return f"rows of {logits.shape[-1]} logits are longer than {MAX_ROW}"
    return why_not_triton(logits)


def _as_3d(logits: Tensor) -> Tensor:
    """``[outer, inner, V]``, of any strides but the last: a slice is not copied."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.ndim <= 3:
        return logits[(None,) * (3 - logits.ndim)]
    return logits.flatten(0, -3)


def _geometry(logits: Tensor, tokens: int, temperature: float) -> tuple[int | float, ...]:
    """What every kernel is told about the logits, in the order of its parameters."""
    rows = _as_3d(logits)
    return (rows.shape[1], *rows.stride()[:2], rows.shape[2], tokens, 1.0 / temperature)


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The same tensors without gaps; None stays."""
    return tuple(x if x is None else x.contiguous() for x in tensors)


def _forward(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    mask: Tensor | None,
    offsets: Tensor | None,
    permitted: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from deeprec.kernels import LAUNCH
    from deeprec.kernels import logprobs as kernels

    values, entropies, states = empty_outputs(
        logits, ids, temperature, mask, offsets, permitted, entropy
    )
    rows = logits.shape[:-1].numel()
    if rows == 0:
        return values, entropies, states
    with torch.cuda.device_of(logits), backends.timed("gather_logprobs", "triton"):
        if reads_values(logits):
            check_range(ids, mask, permitted, logits.shape[-1])
        ids, mask, offsets, permitted = contiguous(ids, mask, offsets, permitted)
        kernels.gather_forward[(rows,)](
            _as_3d(logits),
            ids,
            mask,
            offsets,
            permitted,
            values,
            entropies if entropy else None,
            states,
            *_geometry(logits, values.shape[-1], temperature),
            TOKENS=kernels.TOKENS,
            **LAUNCH,
        )
    return values, entropies, states


def _backward(
    grad_values: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    mask: Tensor | None,
    offsets: Tensor | None,
    permitted: Tensor | None,
    entropy: Tensor,
    states: Tensor,
) -> Tensor:
    import triton

    from deeprec.kernels import LAUNCH
    from deeprec.kernels import logprobs as kernels

    rows, tokens = logits.shape[:-1].numel(), ids.shape[-1]
    # Where some logits get no gradient, the kernels do not touch theirs.
    partial = mask is not None or offsets is not None
    new = torch.zeros if partial else torch.empty
    grad_logits = new(logits.shape, dtype=logits.dtype, device=logits.device)
    if rows == 0:
        return grad_logits
    with torch.cuda.device_of(logits), backends.timed("gather_logprobs_backward", "triton"):
        grad_values, grad_entropy = contiguous(grad_values, grad_entropy)
        ids, mask, offsets, permitted = contiguous(ids, mask, offsets, permitted)
        geometry = _geometry(logits, tokens, temperature)
        rest = (mask, offsets, permitted, entropy, states, grad_logits, *geometry)
        kernels.gather_backward[lambda meta: (rows, triton.cdiv(logits.shape[-1], meta["BLOCK"]))](
            grad_values, grad_entropy, _as_3d(logits), *rest, TOKENS=kernels.TOKENS, **LAUNCH
        )
        if tokens:
            kernels.gather_backward_tokens[(rows, triton.cdiv(tokens, kernels.TOKENS))](
                grad_values,
                grad_entropy,
                _as_3d(logits),
                ids,
                *rest,
                TOKENS=kernels.TOKENS,
                **LAUNCH,
            )
    return grad_logits


run = define("gather_logprobs_triton", "CompositeExplicitAutograd", _forward, _backward)
backends.register("gather_logprobs", "triton", run, why_not)
