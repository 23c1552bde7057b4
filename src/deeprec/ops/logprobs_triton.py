"""The Triton backend of gather_logprobs: strides and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops.gpu import why_not_triton
from deeprec.ops.logprob_checks import check_range, reads_values
from deeprec.ops.logprobs_op import GatherCall, Upstream, define

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
    if logits.ndim <= 3:
        return logits[(None,) * (3 - logits.ndim)]
    return logits.flatten(0, -3)


def _geometry(call: GatherCall, logits: Tensor) -> tuple[int | float, ...]:
    """What every kernel is told about ``[outer, inner, V]``, in the order of its parameters."""
    tokens = call.ids.shape[-1]
    return (logits.shape[1], *logits.stride()[:2], call.vocabulary, tokens, 1 / call.temperature)


def _forward(call: GatherCall, values: Tensor, entropy: Tensor | None, states: Tensor) -> None:
    from deeprec.kernels import LAUNCH
    from deeprec.kernels import logprobs as kernels

    with torch.cuda.device_of(call.logits):
        if reads_values(call.logits):
            check_range(call.ids, call.mask, call.permitted, call.vocabulary)
        logits = _as_3d(call.logits)
        kernels.gather_forward[(call.rows,)](
            logits,
            call.ids,
            call.mask,
            call.offsets,
            call.permitted,
            values,
            entropy,
            states,
            *_geometry(call, logits),
            TOKENS=kernels.TOKENS,
            **LAUNCH,
        )


def _backward(call: GatherCall, upstream: Upstream, grad_logits: Tensor) -> None:
    import triton

    from deeprec.kernels import LAUNCH
    from deeprec.kernels import logprobs as kernels

    rows, tokens = call.rows, call.ids.shape[-1]
    if call.mask is not None or call.offsets is not None:
        grad_logits.zero_()  # where a logit gets no gradient, the kernels do not touch it
    with torch.cuda.device_of(call.logits):
        logits = _as_3d(call.logits)
        gradients = (upstream.grad_values, upstream.grad_entropy, logits)
        limits = (call.mask, call.offsets, call.permitted)
        kept = (upstream.entropy, upstream.states, grad_logits)
        rest = (*limits, *kept, *_geometry(call, logits))
        kernels.gather_backward[lambda meta: (rows, triton.cdiv(call.vocabulary, meta["BLOCK"]))](
            *gradients, *rest, TOKENS=kernels.TOKENS, **LAUNCH
        )
        if tokens:
            kernels.gather_backward_tokens[(rows, triton.cdiv(tokens, kernels.TOKENS))](
                *gradients, call.ids, *rest, TOKENS=kernels.TOKENS, **LAUNCH
            )


run = define("triton", "CompositeExplicitAutograd", _forward, _backward)
backends.register("gather_logprobs", "triton", run, why_not)
