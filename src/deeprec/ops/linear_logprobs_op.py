"""linear_logprobs as a ``torch.library`` op: one per backend, so that a graph keeps its choice.

Shapes, autograd and the order of the arguments are the same for all and written here once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deeprec.ops.allowed import AllowedTokens

__all__ = ["define", "empty_gradients", "empty_outputs"]

_LIBRARY = torch.library.Library("deeprec", "FRAGMENT")


def define(
    name: str,
    key: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make ``deeprec::NAME`` and ``deeprec::NAME_backward`` of a backend's two functions.

    ``forward(hidden, weight, ids, bias, temperature, mask, allowed_offsets, allowed_ids,
    entropy)``, with hidden ``[T, H]``, returns values, entropy (empty unless wanted) and what its
    own backward needs, of the shapes of :func:`empty_outputs`; ``backward(grad_values,
    grad_entropy, hidden, weight, ids, bias, temperature, mask, allowed_offsets, allowed_ids,
    entropy, states, wanted)`` returns the gradients of hidden, weight and bias, of the shapes of
    :func:`empty_gradients`. ``key`` is the dispatch key: "CPU", "CUDA", or
    "CompositeExplicitAutograd" for any device.

    Returns the function that :func:`deeprec.backends.register` wants.
    """
    _LIBRARY.define(
        f"{name}(Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, float temperature, "
        "Tensor? mask, Tensor? allowed_offsets, Tensor? allowed_ids, bool entropy) "
        "-> (Tensor, Tensor, Tensor)"
    )
    _LIBRARY.define(
        f"{name}_backward(Tensor grad_values, Tensor? grad_entropy, Tensor hidden, "
        "Tensor weight, Tensor ids, Tensor? bias, float temperature, Tensor? mask, "
        "Tensor? allowed_offsets, Tensor? allowed_ids, Tensor entropy, Tensor states, "
        "bool[3] wanted) -> (Tensor, Tensor, Tensor)"
    )
    _LIBRARY.impl(name, forward, key)
    _LIBRARY.impl(f"{name}_backward", backward, key)
    torch.library.register_fake(f"deeprec::{name}", empty_outputs, lib=_LIBRARY)
    torch.library.register_fake(f"deeprec::{name}_backward", _fake_backward, lib=_LIBRARY)
    backward_op = getattr(torch.ops.deeprec, f"{name}_backward")

    def autograd(
        ctx: Any, grad_values: Tensor, grad_entropy: Tensor, grad_states: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, bias, mask, offsets, permitted, entropy, states = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        gradients = backward_op(
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

    torch.library.register_autograd(
        f"deeprec::{name}", autograd, setup_context=_setup_context, lib=_LIBRARY
    )
    return _runner(getattr(torch.ops.deeprec, name))


def _runner(op: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
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
        """Values ``[...]`` and entropy ``[...]`` (empty unless wanted)."""
        lead = hidden.shape[:-1]
        offsets, permitted = (None, None) if allowed is None else (allowed.offsets, allowed.ids)
        values, entropies, _ = op(
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

    return run


def empty_outputs(
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
    """Values ``[T]``, entropy ``[T]`` or ``[0]``, and two float32 of state a row."""
    rows = hidden.shape[0]
    return (
        hidden.new_empty((rows,), dtype=torch.float32),
        hidden.new_empty((rows if entropy else 0,), dtype=torch.float32),
        hidden.new_empty((rows, 2), dtype=torch.float32),
    )


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous, and zero where rows that do not count leave them untouched."""
    nothing = hidden.new_empty((0,))
    return (
        hidden.new_zeros(hidden.shape) if wanted[0] else nothing,
        weight.new_empty(weight.shape) if wanted[1] else nothing.clone(),
        bias.new_zeros(bias.shape) if wanted[2] and bias is not None else nothing.clone(),
    )


def _fake_backward(
    grad_values: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, ids, bias, ctx.temperature, mask, offsets, permitted, ctx.entropy = inputs
    _, entropy, states = output
    ctx.save_for_backward(hidden, weight, ids, bias, mask, offsets, permitted, entropy, states)
