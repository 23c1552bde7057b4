"""The CUDA C++ backend of gather_logprobs: tensors to pointers, sizes and strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops.logprobs_cpu import address, dtype_name
from deeprec.ops.logprobs_op import empty_outputs

__all__ = ["kernels"]


def kernels(native: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and backward functions of ``logprobs_op.define`` on the launchers of ``native``."""

    def forward(
        logits: Tensor,
        ids: Tensor,
        temperature: float,
        mask: Tensor | None,
        offsets: Tensor | None,
        permitted: Tensor | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, entropies, states = empty_outputs(
            logits, ids, temperature, mask, offsets, permitted, entropy
        )
        with backends.timed("gather_logprobs", "cuda"):
            problem = _Problem(native, logits, ids, temperature, mask, (offsets, permitted))
            native.gather_logprobs(
                problem.native,
                values=address(values),
                entropy=address(entropies) if entropy else 0,
                states=address(states),
                stream=problem.stream,
            )
        return values, entropies, states

    def backward(
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
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        with backends.timed("gather_logprobs_backward", "cuda"):
            problem = _Problem(native, logits, ids, temperature, mask, (offsets, permitted))
            grad_values = grad_values.contiguous()
            grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
            native.gather_logprobs_backward(
                problem.native,
                grad_values=address(grad_values),
                grad_entropy=address(grad_entropy),
                entropy=address(entropy),
                states=address(states),
                grad_logits=address(grad_logits),
                stream=problem.stream,
            )
        return grad_logits

    return forward, backward


class _Problem:
    """The C++ description of one call, with the tensors it points into kept alive."""

    def __init__(
        self,
        native: Any,
        logits: Tensor,
        ids: Tensor,
        temperature: float,
        mask: Tensor | None,
        allowed: tuple[Tensor | None, Tensor | None],
    ) -> None:
        self.logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        self.row_offsets, row_stride = _rows(self.logits)
        self.arrays = [x if x is None else x.contiguous() for x in (ids, mask, *allowed)]
        ids_at, mask_at, offsets_at, permitted_at = map(address, self.arrays)
        self.stream = current_stream(logits)
        self.native = native.GatherProblem(
            logits=address(self.logits),
            dtype=dtype_name(logits),
            rows=(address(self.row_offsets), row_stride),
            shape=(logits.shape[:-1].numel(), logits.shape[-1], ids.shape[-1]),
            ids=ids_at,
            mask=mask_at,
            allowed=(offsets_at, permitted_at),
            temperature=temperature,
        )


def current_stream(tensor: Tensor) -> int:
    """torch's current stream on the device of ``tensor``; 0 on a CPU, where kernels are emulated."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _rows(logits: Tensor) -> tuple[Tensor | None, int]:
    """Where rows start, in elements: a stride where one will do, else an offset a row."""
    lead = [(n, s) for n, s in zip(logits.shape[:-1], logits.stride()[:-1], strict=True) if n > 1]
    if all(s == next_n * next_s for (_, s), (next_n, next_s) in zip(lead, lead[1:], strict=False)):
        return None, lead[-1][1] if lead else logits.shape[-1]
    offsets = torch.zeros((), dtype=torch.int64, device=logits.device)
    for n, s in lead:
        offsets = offsets[..., None] + torch.arange(n, device=logits.device) * s
    return offsets.reshape(-1), 0
