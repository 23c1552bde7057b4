"""linear_logprobs as a ``torch.library`` op: one per backend, so that a graph keeps its choice.

Schema, shapes, outputs, autograd and the op table's clock are the same for all and written here
once; a backend is two functions that fill outputs in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops.allowed import AllowedTokens
from deeprec.ops.logprobs_op import Upstream
from deeprec.ops.native import contiguous, rows_of

__all__ = ["Gradients", "LinearCall", "define", "why_not_float64"]

_LIBRARY = torch.library.Library("deeprec", "FRAGMENT")


@dataclass
class LinearCall:
    """The inputs of one call. Everything is made contiguous; of hidden and weight, every row."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    ids: Tensor  # [T], int64
    bias: Tensor | None  # [V], float32
    temperature: float
    mask: Tensor | None
    offsets: Tensor | None
    permitted: Tensor | None

    def __post_init__(self) -> None:
        self.hidden, self.weight = rows_of(self.hidden), rows_of(self.weight)
        self.ids, self.bias = self.ids.contiguous(), contiguous(self.bias)
        self.mask, self.offsets = contiguous(self.mask), contiguous(self.offsets)
        self.permitted = contiguous(self.permitted)

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def size(self) -> int:
        return self.weight.shape[1]


@dataclass
class Gradients:
    """Where a backward pass writes; None where nobody asks.

    The hidden's and the bias's start as zeros, because some rows may have none; the weight's is
    not initialised.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def define(
    backend: str,
    key: str,
    forward: Callable[[LinearCall, Tensor, Tensor | None, Tensor], None],
    backward: Callable[[LinearCall, Upstream, Gradients], None],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make ``deeprec::linear_logprobs_BACKEND`` (of "cpu": without the suffix) and its backward.

    ``forward(call, values, entropy, states)`` writes values ``[T]``, entropy ``[T]`` (None where
    it is not wanted) and states ``[T, 2]``, whatever its own backward needs; ``backward(call,
    upstream, gradients)`` writes the gradients. Neither is called without rows. ``key`` is the
    dispatch key: "CPU", "CUDA", or "CompositeExplicitAutograd" for any device.

    Returns the function that :func:`deeprec.backends.register` wants.
    """
    name = "linear_logprobs" + ("" if backend == "cpu" else f"_{backend}")
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

    def run_forward(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, wants_entropy = rest
        outputs = values, entropy, states = _empty_outputs(hidden, *rest)
        with backends.timed("linear_logprobs", backend):
            if len(hidden):
                call = LinearCall(hidden, *inputs)
                forward(call, values, entropy if wants_entropy else None, states)
        return outputs

    def run_backward(
        grad_values: Tensor, grad_entropy: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, entropy, states, _ = rest
        gradients = _empty_gradients(grad_values, grad_entropy, *rest)
        with backends.timed("linear_logprobs_backward", backend):
            if not len(states):
                gradients[1].zero_()
            elif any(gradient.numel() for gradient in gradients):
                asked = (g if g.numel() else None for g in gradients)
                upstream = Upstream(grad_values, grad_entropy, entropy, states)
                backward(LinearCall(*inputs), upstream, Gradients(*asked))
        return gradients

    _LIBRARY.impl(name, run_forward, key)
    _LIBRARY.impl(f"{name}_backward", run_backward, key)
    torch.library.register_fake(f"deeprec::{name}", _empty_outputs, lib=_LIBRARY)
    torch.library.register_fake(f"deeprec::{name}_backward", _empty_gradients, lib=_LIBRARY)
    backward_op = getattr(torch.ops.deeprec, f"{name}_backward")

    def autograd(
        ctx: Any, grad_values: Tensor, grad_entropy: Tensor, grad_states: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, bias, mask, offsets, permitted, entropy, states = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        given = (grad_values, grad_entropy if ctx.entropy else None)
        inputs = (hidden, weight, ids, bias, ctx.temperature, mask, offsets, permitted)
        gradients = backward_op(*given, *inputs, entropy, states, wanted)
        grad_hidden, grad_weight, grad_bias = (
            gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
        )
        return grad_hidden, grad_weight, None, grad_bias, *[None] * 5

    torch.library.register_autograd(
        f"deeprec::{name}", autograd, setup_context=_setup_context, lib=_LIBRARY
    )
    return _runner(getattr(torch.ops.deeprec, name))


def why_not_float64(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels of no backend but the reference take these; None where they do."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is float64, which only the reference computes"
    return None


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


def _empty_outputs(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[T]``, entropy ``[T]`` or ``[0]``, and two float32 of state a row."""
    rows, entropy = hidden.shape[0], rest[-1]
    return (
        hidden.new_empty((rows,), dtype=torch.float32),
        hidden.new_empty((rows if entropy else 0,), dtype=torch.float32),
        hidden.new_empty((rows, 2), dtype=torch.float32),
    )


def _empty_gradients(
    grad_values: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous, as :class:`Gradients` says; empty where nobody asks."""
    wanted, nothing = rest[-1], hidden.new_empty((0,))
    return (
        hidden.new_zeros(hidden.shape) if wanted[0] else nothing,
        weight.new_empty(weight.shape) if wanted[1] else nothing.clone(),
        bias.new_zeros(bias.shape) if wanted[2] and bias is not None else nothing.clone(),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, ids, bias, ctx.temperature, mask, offsets, permitted, ctx.entropy = inputs
    _, entropy, states = output
    ctx.save_for_backward(hidden, weight, ids, bias, mask, offsets, permitted, entropy, states)
