"""The C++ backend of linear_logprobs: tensors to pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops.linear_logprobs_op import define, empty_gradients, empty_outputs
from deeprec.ops.logprob_checks import check_range
from deeprec.ops.logprobs_cpu import address, dtype_name

__all__ = ["run", "why_not"]


def why_not(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None where the kernels can run, else the reason."""
    if hidden.device.type != "cpu":
        return f"hidden is on {hidden.device}"
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is float64, which only the reference computes"
    return None


def _matrix(tensor: Tensor) -> tuple[int, str, int, int, int]:
    return (address(tensor), dtype_name(tensor), *tensor.shape, tensor.stride(0))


class _Problem:
    """The C++ description of one call, with the tensors it points into kept alive."""

    def __init__(
        self,
        matrices: tuple[Tensor, Tensor],
        ids: Tensor,
        bias: Tensor | None,
        temperature: float,
        mask: Tensor | None,
        allowed: tuple[Tensor | None, Tensor | None],
    ) -> None:
        self.matrices = [x if x.stride(-1) == 1 else x.contiguous() for x in matrices]
        self.arrays = [x if x is None else x.contiguous() for x in (ids, bias, mask, *allowed)]
        ids_at, bias_at, mask_at, offsets_at, permitted_at = map(address, self.arrays)
        self.native = _C.LinearProblem(
            hidden=_matrix(self.matrices[0]),
            weight=_matrix(self.matrices[1]),
            bias=bias_at,
            ids=ids_at,
            mask=mask_at,
            allowed=(offsets_at, permitted_at),
            temperature=temperature,
            threads=torch.get_num_threads(),
        )


def _forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    offsets: Tensor | None,
    permitted: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    values, entropies, states = empty_outputs(
        hidden, weight, ids, bias, temperature, mask, offsets, permitted, entropy
    )
    with backends.timed("linear_logprobs", "cpu"):
        check_range(ids, mask, permitted, weight.shape[0])
        problem = _Problem((hidden, weight), ids, bias, temperature, mask, (offsets, permitted))
        _C.linear_logprobs(
            problem.native,
            values=address(values),
            entropy=address(entropies) if entropy else 0,
            states=address(states),
        )
    return values, entropies, states


def _backward(
    grad_values: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    offsets: Tensor | None,
    permitted: Tensor | None,
    entropy: Tensor,
    states: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = empty_gradients(hidden, weight, bias, wanted)
    with backends.timed("linear_logprobs_backward", "cpu"):
        problem = _Problem((hidden, weight), ids, bias, temperature, mask, (offsets, permitted))
        grad_values = grad_values.contiguous()
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        at = [address(x) if x.numel() else 0 for x in gradients]
        _C.linear_logprobs_backward(
            problem.native,
            grad_values=address(grad_values),
            grad_entropy=address(grad_entropy),
            entropy=address(entropy),
            states=address(states),
            grad_hidden=at[0],
            grad_weight=at[1],
            grad_bias=at[2],
        )
    return gradients


run = define("linear_logprobs", "CPU", _forward, _backward)
