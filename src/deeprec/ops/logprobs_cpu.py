"""The C++ backend of gather_logprobs as ``torch.library`` ops, so that graphs may hold it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops.allowed import AllowedTokens
from deeprec.ops.logprob_checks import check_range

__all__ = ["run", "why_not"]

_LIBRARY = torch.library.Library("deeprec", "FRAGMENT")
_LIBRARY.define(
    "gather_logprobs(Tensor logits, Tensor ids, float temperature, Tensor? mask, "
    "Tensor? allowed_offsets, Tensor? allowed_ids, bool entropy) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "gather_logprobs_backward(Tensor grad_values, Tensor? grad_entropy, Tensor logits, "
    "Tensor ids, float temperature, Tensor? mask, Tensor? allowed_offsets, "
    "Tensor? allowed_ids, Tensor entropy, Tensor states) -> Tensor"
)


def why_not(logits: Tensor) -> str | None:
    """None where the kernels can run, else the reason."""
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}"
    if logits.dtype == torch.float64:
        return "logits are float64, which only the reference computes"
    return None


def run(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    mask: Tensor | None,
    allowed: AllowedTokens | None,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Values of the shape of ids ``[..., K]`` and entropy ``[...]`` (empty unless asked for)."""
    offsets, permitted = (None, None) if allowed is None else (allowed.offsets, allowed.ids)
    values, entropies, _ = torch.ops.deeprec.gather_logprobs(
        logits, ids.long(), temperature, mask, offsets, permitted, entropy
    )
    return values, entropies


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
    values, entropies, states = _empty_outputs(
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


def _empty_outputs(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    mask: Tensor | None,
    offsets: Tensor | None,
    permitted: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lead = logits.shape[:-1]
    return (
        logits.new_empty(ids.shape, dtype=torch.float32),
        logits.new_empty(lead if entropy else (0,), dtype=torch.float32),
        logits.new_empty((*lead, 2), dtype=torch.float32),
    )


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, ctx.temperature, mask, offsets, permitted, ctx.entropy = inputs
    _, entropy, states = output
    ctx.save_for_backward(logits, ids, mask, offsets, permitted, entropy, states)


def _autograd(
    ctx: Any, grad_values: Tensor, grad_entropy: Tensor, grad_states: Tensor
) -> tuple[Tensor | None, ...]:
    logits, ids, mask, offsets, permitted, entropy, states = ctx.saved_tensors
    grad_logits = torch.ops.deeprec.gather_logprobs_backward(
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


_LIBRARY.impl("gather_logprobs", _forward, "CPU")
_LIBRARY.impl("gather_logprobs_backward", _backward, "CPU")
torch.library.register_fake("deeprec::gather_logprobs", _empty_outputs, lib=_LIBRARY)
torch.library.register_fake(
    "deeprec::gather_logprobs_backward",
    lambda grad_values, grad_entropy, logits, *rest: logits.new_empty(logits.shape),
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "deeprec::gather_logprobs", _autograd, setup_context=_setup_context, lib=_LIBRARY
)
