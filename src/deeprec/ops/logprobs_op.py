"""gather_logprobs as a ``torch.library`` op: one per backend, so that a graph keeps its choice.

Schema, shapes, outputs, autograd and the op table's clock are the same for all and written here
once; a backend is two functions that fill outputs in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops.allowed import AllowedTokens
from deeprec.ops.native import address, contiguous, dtype_name, rows_of

__all__ = ["GatherCall", "Upstream", "define"]

_LIBRARY = torch.library.Library("deeprec", "FRAGMENT")


@dataclass
class GatherCall:
    """The inputs of one call. Everything is made contiguous; of the logits, every row."""

    logits: Tensor  # [..., V]
    ids: Tensor  # [..., K], int64
    temperature: float
    mask: Tensor | None
    offsets: Tensor | None
    permitted: Tensor | None

    def __post_init__(self) -> None:
        self.logits, self.ids = rows_of(self.logits), self.ids.contiguous()
        self.mask, self.offsets = contiguous(self.mask), contiguous(self.offsets)
        self.permitted = contiguous(self.permitted)

    @property
    def rows(self) -> int:
        return self.logits.shape[:-1].numel()

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]

    def problem(self, threads: int) -> _C.GatherProblem:
        """What the kernels of ``_C`` are told; it points into this call's tensors."""
        self._row_offsets = None if self.logits.is_contiguous() else _row_offsets(self.logits)
        return _C.GatherProblem(
            logits=address(self.logits),
            dtype=dtype_name(self.logits),
            row_offsets=address(self._row_offsets),
            shape=(self.rows, self.vocabulary, self.ids.shape[-1]),
            ids=address(self.ids),
            mask=address(self.mask),
            allowed=(address(self.offsets), address(self.permitted)),
            temperature=self.temperature,
            threads=threads,
        )


@dataclass
class Upstream:
    """What a backward pass is given beside the inputs; all contiguous."""

    grad_values: Tensor
    grad_entropy: Tensor | None  # None where no entropy was asked for
    entropy: Tensor
    states: Tensor  # what forward has kept, two float32 a row

    def __post_init__(self) -> None:
        self.grad_values = self.grad_values.contiguous()
        self.grad_entropy = contiguous(self.grad_entropy)

    def addresses(self) -> dict[str, int]:
        """For the kernels of ``_C``."""
        return {name: address(tensor) for name, tensor in vars(self).items()}


def define(
    backend: str,
    key: str,
    forward: Callable[[GatherCall, Tensor, Tensor | None, Tensor], None],
    backward: Callable[[GatherCall, Upstream, Tensor], None],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make ``deeprec::gather_logprobs_BACKEND`` (of "cpu": without the suffix) and its backward.

    ``forward(call, values, entropy, states)`` writes values ``[..., K]``, entropy ``[...]`` (None
    where it is not wanted) and states ``[..., 2]``, whatever its own backward needs;
    ``backward(call, upstream, grad_logits)`` writes the gradient, contiguous. Neither is called
    without rows. ``key`` is the dispatch key: "CPU", "CUDA", or "CompositeExplicitAutograd" for
    any device.

    Returns the function that :func:`deeprec.backends.register` wants.
    """
    name = "gather_logprobs" + ("" if backend == "cpu" else f"_{backend}")
    _LIBRARY.define(
        f"{name}(Tensor logits, Tensor ids, float temperature, Tensor? mask, "
        "Tensor? allowed_offsets, Tensor? allowed_ids, bool entropy) -> (Tensor, Tensor, Tensor)"
    )
    _LIBRARY.define(
        f"{name}_backward(Tensor grad_values, Tensor? grad_entropy, Tensor logits, "
        "Tensor ids, float temperature, Tensor? mask, Tensor? allowed_offsets, "
        "Tensor? allowed_ids, Tensor entropy, Tensor states) -> Tensor"
    )

    def run_forward(logits: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, wants_entropy = rest
        outputs = values, entropy, states = _empty_outputs(logits, ids, *rest)
        with backends.timed("gather_logprobs", backend):
            if states.numel():
                call = GatherCall(logits, ids, *inputs)
                forward(call, values, entropy if wants_entropy else None, states)
        return outputs

    def run_backward(
        grad_values: Tensor, grad_entropy: Tensor | None, logits: Tensor, *rest: Any
    ) -> Tensor:
        *inputs, entropy, states = rest
        grad_logits = _empty_gradient(grad_values, grad_entropy, logits)
        with backends.timed("gather_logprobs_backward", backend):
            if states.numel():
                upstream = Upstream(grad_values, grad_entropy, entropy, states)
                backward(GatherCall(logits, *inputs), upstream, grad_logits)
        return grad_logits

    _LIBRARY.impl(name, run_forward, key)
    _LIBRARY.impl(f"{name}_backward", run_backward, key)
    torch.library.register_fake(f"deeprec::{name}", _empty_outputs, lib=_LIBRARY)
    torch.library.register_fake(f"deeprec::{name}_backward", _empty_gradient, lib=_LIBRARY)
    backward_op = getattr(torch.ops.deeprec, f"{name}_backward")

    def autograd(
        ctx: Any, grad_values: Tensor, grad_entropy: Tensor, grad_states: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, ids, mask, offsets, permitted, entropy, states = ctx.saved_tensors
        given = (grad_values, grad_entropy if ctx.entropy else None)
        inputs = (logits, ids, ctx.temperature, mask, offsets, permitted)
        return backward_op(*given, *inputs, entropy, states), *[None] * 6

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


def _row_offsets(logits: Tensor) -> Tensor:
    """Where each row starts, in elements, so that slices of larger tensors need no copy."""
    offsets = torch.zeros((), dtype=torch.int64, device=logits.device)
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        offsets = offsets[..., None] + torch.arange(size, device=logits.device) * stride
    return offsets.reshape(-1)


def _empty_outputs(logits: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[..., K]``, entropy ``[...]`` or ``[0]``, and two float32 of state a row."""
    lead, entropy = logits.shape[:-1], rest[-1]
    return (
        logits.new_empty(ids.shape, dtype=torch.float32),
        logits.new_empty(lead if entropy else (0,), dtype=torch.float32),
        logits.new_empty((*lead, 2), dtype=torch.float32),
    )


def _empty_gradient(
    grad_values: Tensor, grad_entropy: Tensor | None, logits: Tensor, *rest: Any
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, ctx.temperature, mask, offsets, permitted, ctx.entropy = inputs
    _, entropy, states = output
    ctx.save_for_backward(logits, ids, mask, offsets, permitted, entropy, states)
