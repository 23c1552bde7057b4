"""The C++ backend of gather_logprobs: tensors to pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops.logprob_checks import check_range
from deeprec.ops.logprobs_op import define, empty_outputs

__all__ = ["run", "why_not"]


def why_not(logits: Tensor) -> str | None:
    """None where the kernels can run, else the reason."""
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}"
    if logits.dtype == torch.float64:
        return "logits are float64, which only the reference computes"
    return None


def address(tensor: Tensor | None) -> int:
    """Where the data of a tensor lies, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_name(tensor: Tensor) -> str:
    """ "float32" of torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def _row_offsets(logits: Tensor) -> Tensor:
    """Where each row starts, in elements, so that slices of larger tensors need no copy."""
    offsets = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(logits.shape[:-1], logits.stride()[:-1], strict=True)):
        steps = torch.arange(size, dtype=torch.int64) * stride
        offsets += steps.view(-1, *[1] * (logits.ndim - 2 - dim))
    return offsets


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
        self.row_offsets = _row_offsets(self.logits)
        self.arrays = [x if x is None else x.contiguous() for x in (ids, mask, offsets, permitted)]
        self.native = _C.GatherProblem(
            logits=address(self.logits),
            dtype=dtype_name(logits),
            row_offsets=address(self.row_offsets),
            shape=(self.row_offsets.numel(), logits.shape[-1], ids.shape[-1]),
            ids=address(self.arrays[0]),
            mask=address(self.arrays[1]),
            allowed=(address(self.arrays[2]), address(self.arrays[3])),
            temperature=temperature,
            threads=torch.get_num_threads(),
        )


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
    with backends.timed("gather_logprobs", "cpu"):
        check_range(ids, mask, permitted, logits.shape[-1])
        problem = _Problem(logits, ids, temperature, mask, offsets, permitted)
        _C.gather_logprobs(
            problem.native,
            values=address(values),
            entropy=address(entropies) if entropy else 0,
            states=address(states),
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
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype)
    with backends.timed("gather_logprobs_backward", "cpu"):
        problem = _Problem(logits, ids, temperature, mask, offsets, permitted)
        grad_values = grad_values.contiguous()
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        _C.gather_logprobs_backward(
            problem.native,
            grad_values=address(grad_values),
            grad_entropy=address(grad_entropy),
            entropy=address(entropy),
            states=address(states),
            grad_logits=address(grad_logits),
        )
    return grad_logits


run = define("gather_logprobs", "CPU", _forward, _backward)
