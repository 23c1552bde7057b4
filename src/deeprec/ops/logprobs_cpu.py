"""The C++ backend of gather_logprobs."""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec import _C
from deeprec.ops.logprob_checks import check_range
from deeprec.ops.logprobs_op import GatherCall, Upstream, define
from deeprec.ops.native import address

__all__ = ["run", "why_not"]


def why_not(logits: Tensor) -> str | None:
    """None where the kernels can run, else the reason."""
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}"
    if logits.dtype == torch.float64:
        return "logits are float64, which only the reference computes"
    return None


def _forward(call: GatherCall, values: Tensor, entropy: Tensor | None, states: Tensor) -> None:
    check_range(call.ids, call.mask, call.permitted, call.vocabulary)
    _C.gather_logprobs(
        call.problem(torch.get_num_threads()),
        values=address(values),
        entropy=address(entropy),
        states=address(states),
    )


def _backward(call: GatherCall, upstream: Upstream, grad_logits: Tensor) -> None:
    _C.gather_logprobs_backward(
        call.problem(torch.get_num_threads()),
        **upstream.addresses(),
        grad_logits=address(grad_logits),
    )


run = define("cpu", "CPU", _forward, _backward)
