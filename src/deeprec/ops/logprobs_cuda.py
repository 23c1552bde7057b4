"""gather_logprobs on CUDA: hands addresses to the kernels of ``csrc/cuda/logprobs.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops import cuda
from deeprec.ops.logprobs_cpu import address, dtype_name
from deeprec.ops.logprobs_op import define, empty_outputs

__all__: list[str] = []


class _Problem:
    """The C++ description of one call, with the tensors it points into kept alive."""

    def __init__(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: float,
        mask: Tensor | None,
        offsets: Tensor | None,
        permitted: Tensor | None,
    ) -> None:
        self.logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        self.row_offsets = None if self.logits.is_contiguous() else _row_offsets(self.logits)
        self.arrays = [x if x is None else x.contiguous() for x in (ids, mask, offsets, permitted)]
        self.native = _C.GatherProblem(
            logits=address(self.logits),
            dtype=dtype_name(logits),
            row_offsets=address(self.row_offsets),
            shape=(logits.shape[:-1].numel(), logits.shape[-1], ids.shape[-1]),
            ids=address(self.arrays[0]),
            mask=address(self.arrays[1]),
            allowed=(address(self.arrays[2]), address(self.arrays[3])),
            temperature=temperature,
            threads=1,
        )


def _row_offsets(logits: Tensor) -> Tensor:
    """Where each row starts, in elements, so that slices of larger tensors need no copy."""
    offsets = torch.zeros((), dtype=torch.int64, device=logits.device)
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        offsets = offsets[..., None] + torch.arange(size, device=logits.device) * stride
    return offsets.reshape(-1)


def _forward(
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
    with backends.timed("gather_logprobs", "cuda"), cuda.on(logits) as target:
        problem = _Problem(logits, ids, temperature, mask, offsets, permitted)
        target.kernels.gather_logprobs(
            problem.native,
            values=address(values),
            entropy=address(entropies) if entropy else 0,
            states=address(states),
            stream=target.stream,
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
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    with backends.timed("gather_logprobs_backward", "cuda"), cuda.on(logits) as target:
        problem = _Problem(logits, ids, temperature, mask, offsets, permitted)
        grad_values = grad_values.contiguous()
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        target.kernels.gather_logprobs_backward(
            problem.native,
            grad_values=address(grad_values),
            grad_entropy=address(grad_entropy),
            entropy=address(entropy),
            states=address(states),
            grad_logits=address(grad_logits),
            stream=target.stream,
        )
    return grad_logits


def _why_not(logits: Tensor) -> str | None:
    if logits.dtype == torch.float64:
        return "logits are float64, which only the reference computes"
    return cuda.why_not(logits)


_run = define("gather_logprobs_cuda", "CompositeExplicitAutograd", _forward, _backward)
backends.register("gather_logprobs", "cuda", _run, _why_not)
