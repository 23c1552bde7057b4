"""gather_logprobs on CUDA: hands addresses to the kernels of ``csrc/cuda/logprobs.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops import cuda
from deeprec.ops.logprobs_op import GatherCall, Upstream, define
from deeprec.ops.native import address

__all__: list[str] = []


def _forward(call: GatherCall, values: Tensor, entropy: Tensor | None, states: Tensor) -> None:
    with cuda.on(call.logits) as target:
        target.kernels.gather_logprobs(
            call.problem(threads=1),
            values=address(values),
            entropy=address(entropy),
            states=address(states),
            stream=target.stream,
        )


def _backward(call: GatherCall, upstream: Upstream, grad_logits: Tensor) -> None:
    with cuda.on(call.logits) as target:
        target.kernels.gather_logprobs_backward(
            call.problem(threads=1),
            **upstream.addresses(),
            grad_logits=address(grad_logits),
            stream=target.stream,
        )


def _why_not(logits: Tensor) -> str | None:
    if logits.dtype == torch.float64:
        return "logits are float64, which only the reference computes"
    return cuda.why_not(logits)


_run = define("cuda", "CompositeExplicitAutograd", _forward, _backward)
backends.register("gather_logprobs", "cuda", _run, _why_not)
