"""The C++ backend of linear_logprobs as ``torch.library`` ops, so that graphs may hold it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops.allowed import AllowedTokens
from deeprec.ops.logprob_checks import check_range
from deeprec.ops.logprobs_cpu import address, dtype_name

__all__ = ["run", "why_not"]

_LIBRARY = torch.library.Library("deeprec", "FRAGMENT")
_LIBRARY.define(
    "linear_logprobs(Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, float temperature, "
    "Tensor? mask, Tensor? allowed_offsets, Tensor? allowed_ids, bool entropy) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "linear_logprobs_backward(Tensor grad_values, Tensor? grad_entropy, Tensor hidden, "
    "Tensor weight, Tensor ids, Tensor? bias, float temperature, Tensor? mask, "
    "Tensor? allowed_offsets, Tensor? allowed_ids, Tensor entropy, Tensor states, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)"
)


def why_not(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None where the kernels can run, else the reason."""
    if hidden.device.type != "cpu":
        return f"hidden is on {hidden.device}"
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is float64, which only the reference computes"
    return None


def run(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    allowed: AllowedTokens | None,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Values ``[...]`` and entropy ``[...]`` (empty unless asked for)."""
    lead = hidden.shape[:-1]
    offsets, permitted = (None, None) if allowed is None else (allowed.offsets, allowed.ids)
    values, entropies, _ = torch.ops.deeprec.linear_logprobs(
        hidden.reshape(lead.numel(), hidden.shape[-1]),
        weight,
        ids.reshape(-1).long(),
        None if bias is None else bias.float(),
        temperature,
        None if mask is None else mask.reshape(-1),
        offsets,
        permitted,
        entropy,
    )
    return values.view(lead), entropies.view(lead) if entropy else entropies


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


def _empty_outputs(
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
    rows = hidden.shape[0]
    return (
        hidden.new_empty((rows,), dtype=torch.float32),
        hidden.new_empty((rows if entropy else 0,), dtype=torch.float32),
        hidden.new_empty((rows, 2), dtype=torch.float32),
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
    values, entropies, states = _empty_outputs(
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


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous, and zero where rows that do not count leave them untouched."""
    nothing = hidden.new_empty((0,))
    return (
        hidden.new_zeros(hidden.shape) if wanted[0] else nothing,
        weight.new_empty(weight.shape) if wanted[1] else nothing.clone(),
        bias.new_zeros(bias.shape) if wanted[2] and bias is not None else nothing.clone(),
    )


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
    gradients = _empty_gradients(hidden, weight, bias, wanted)
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


def _fake_backward(
    grad_values: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, bias, rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, ids, bias, ctx.temperature, mask, offsets, permitted, ctx.entropy = inputs
    _, entropy, states = output
    ctx.save_for_backward(hidden, weight, ids, bias, mask, offsets, permitted, entropy, states)


def _autograd(
    ctx: Any, grad_values: Tensor, grad_entropy: Tensor, grad_states: Tensor
) -> tuple[Tensor | None, ...]:
    hidden, weight, ids, bias, mask, offsets, permitted, entropy, states = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = torch.ops.deeprec.linear_logprobs_backward(
        grad_values,
        grad_entropy if ctx.entropy else None,
        hidden,
        weight,
        ids,
        bias,
        ctx.temperature,
        mask,
        offsets,
        permitted,
        entropy,
        states,
        wanted,
    )
    grad_hidden, grad_weight, grad_bias = (
        gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None, None


_LIBRARY.impl("linear_logprobs", _forward, "CPU")
_LIBRARY.impl("linear_logprobs_backward", _backward, "CPU")
torch.library.register_fake("deeprec::linear_logprobs", _empty_outputs, lib=_LIBRARY)
torch.library.register_fake("deeprec::linear_logprobs_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "deeprec::linear_logprobs", _autograd, setup_context=_setup_context, lib=_LIBRARY
)
