"""The C++ backend of linear_logprobs."""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec import _C
from deeprec.ops.linear_logprobs_op import Gradients, LinearCall, define, why_not_float64
from deeprec.ops.logprob_checks import check_range
from deeprec.ops.logprobs_op import Upstream
from deeprec.ops.native import address, matrix

__all__ = ["run", "why_not"]


def why_not(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None where the kernels can run, else the reason."""
    if hidden.device.type != "cpu":
        return f"hidden is on {hidden.device}"
    return why_not_float64(hidden, weight, bias)


def _problem(call: LinearCall) -> _C.LinearProblem:
    return _C.LinearProblem(
        hidden=matrix(call.hidden),
        weight=matrix(call.weight),
        bias=address(call.bias),
        ids=address(call.ids),
        mask=address(call.mask),
        allowed=(address(call.offsets), address(call.permitted)),
        temperature=call.temperature,
        threads=torch.get_num_threads(),
    )


def _forward(call: LinearCall, values: Tensor, entropy: Tensor | None, states: Tensor) -> None:
    check_range(call.ids, call.mask, call.permitted, call.vocabulary)
    _C.linear_logprobs(
        _problem(call), values=address(values), entropy=address(entropy), states=address(states)
    )


def _backward(call: LinearCall, upstream: Upstream, gradients: Gradients) -> None:
    _C.linear_logprobs_backward(
        _problem(call),
        **upstream.addresses(),
        grad_hidden=address(gradients.hidden),
        grad_weight=address(gradients.weight),
        grad_bias=address(gradients.bias),
    )


run = define("cpu", "CPU", _forward, _backward)
