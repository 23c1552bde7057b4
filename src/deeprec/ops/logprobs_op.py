"""gather_logprobs as a ``torch.library`` op: one per backend, so that a graph keeps its choice.

Shapes, autograd and the order of the arguments are the same for all and written here once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deeprec.ops.allowed import AllowedTokens

__all__ = ["define", "empty_outputs"]

_LIBRARY = torch.library.Library("deeprec", "FRAGMENT")


def define(
    name: str,
    key: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., Tensor],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make ``deeprec::NAME`` and ``deeprec::NAME_backward`` of a backend's two functions.

    ``forward(logits, ids, temperature, mask, allowed_offsets, allowed_ids, entropy)`` returns
    values, entropy (empty unless wanted) and what its own backward needs, of the shapes of
    :func:`empty_outputs`; ``backward(grad_values, grad_entropy, logits, ids, temperature, mask,
    allowed_offsets, allowed_ids, entropy, states)`` returns the gradient of the logits, contiguous.
    ``key`` is the dispatch key: "CPU", "CUDA", or "CompositeExplicitAutograd" for any device.

    Returns the function that :func:`deeprec.backends.register` wants.
    """
    _LIBRARY.define(
        f"{name}(Tensor logits, Tensor ids, float temperature, Tensor? mask, "
        "Tensor? allowed_offsets, Tensor? allowed_ids, bool entropy) -> (Tensor, Tensor, Tensor)"
    )
    _LIBRARY.define(
        f"{name}_backward(Tensor grad_values, Tensor? grad_entropy, Tensor logits, "
        "Tensor ids, float temperature, Tensor? mask, Tensor? allowed_offsets, "
        "Tensor? allowed_ids, Tensor entropy, Tensor states) -> Tensor"
    )
    _LIBRARY.impl(name, forward, key)
    _LIBRARY.impl(f"{name}_backward", backward, key)
    torch.library.register_fake(f"deeprec::{name}", empty_outputs, lib=_LIBRARY)
    torch.library.register_fake(
        f"deeprec::{name}_backward",
        lambda grad_values, grad_entropy, logits, *rest: logits.new_empty(logits.shape),
        lib=_LIBRARY,
    )
    backward_op = getattr(torch.ops.deeprec, f"{name}_backward")

    def autograd(
        ctx: Any, grad_values: Tensor, grad_entropy: Tensor, grad_states: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, ids, mask, offsets, permitted, entropy, states = ctx.saved_tensors
        grad_logits = backward_op(
            grad_values,
            grad_entropy if ctx.entropy else None,
            logits,
            ids,
            ctx.temperature,
            mask,
            offsets,
            permitted,
            entropy,
            states,
        )
        return grad_logits, None, None, None, None, None, None

    torch.library.register_autograd(
        f"deeprec::{name}", autograd, setup_context=_setup_context, lib=_LIBRARY
    )
    return _runner(getattr(torch.ops.deeprec, name))


def _runner(op: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(
        logits: Tensor,
        ids: Tensor,
        temperature: float,
        mask: Tensor | None,
        allowed: AllowedTokens | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Values of the shape of ids ``[..., K]`` and entropy ``[...]`` (empty unless wanted)."""
        offsets, permitted = (None, None) if allowed is None else (allowed.offsets, allowed.ids)
        values, entropies, _ = op(
            logits, ids.long(), temperature, mask, offsets, permitted, entropy
        )
        return values, entropies

    return run


def empty_outputs(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    mask: Tensor | None,
    offsets: Tensor | None,
    permitted: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[..., K]``, entropy ``[...]`` or ``[0]``, and two float32 of state a row."""
    lead = logits.shape[:-1]
    return (
        logits.new_empty(ids.shape, dtype=torch.float32),
        logits.new_empty(lead if entropy else (0,), dtype=torch.float32),
        logits.new_empty((*lead, 2), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, ctx.temperature, mask, offsets, permitted, ctx.entropy = inputs
    _, entropy, states = output
    ctx.save_for_backward(logits, ids, mask, offsets, permitted, entropy, states)
