"""Log-prob of given tokens under a linear head, without its logits in memory."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops import linear_logprobs_cpu
from deeprec.ops.allowed import AllowedTokens
from deeprec.ops.logprob_checks import (
    as_tensors,
    check_floats,
    check_ids,
    check_range,
    check_rows,
    reads_values,
    timed_eagerly,
)
from deeprec.ops.reference import logprobs as reference

__all__ = ["linear_logprobs"]


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    mask: Tensor | None = ...,
    allowed: AllowedTokens | None = ...,
    entropy: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    mask: Tensor | None = ...,
    allowed: AllowedTokens | None = ...,
    entropy: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    allowed: AllowedTokens | None = None,
    entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`gather_logprobs` of ``hidden @ weight.T + bias``, which is never held.

    The negated result is the cross-entropy loss of each row. Products are accumulated and
    results returned in float32 (float64 if an input is, on the reference backend); under
    autocast, hidden and weight are first cast to its dtype, as ``torch.nn.functional.linear``
    does. A row whose hidden state, or any weight it reads, is not finite becomes NaN.
    Differentiable in hidden, weight and bias, once; gradients have their dtypes.

    Args:
        hidden: ``[..., H]``, float32, bfloat16, float16 or float64.
        weight: ``[V, H]``, of any of these types, which may differ from hidden's.
        token_ids: integers ``[...]`` in ``[0, V)``.
        bias: ``[V]``, or None.
        temperature: divides the logits; positive and finite.
        mask: bool ``[...]``, True = counted. Elsewhere values, entropy and gradients are 0,
            neither ids nor hidden are read and nothing is computed.
        allowed: permitted ids of every row (leading dimensions flattened). The softmax runs over
            them alone, and no other row of ``weight`` is read for that row.
        entropy: also return every row's entropy in nats, differentiable too.
        backend: "cuda", "triton", "cpu", "reference" or None for the first that can run.

    Returns:
        Log-probs ``[...]``, or (log-probs, entropy), both ``[...]``.

    Raises:
        TypeError: a dtype does not fit, or weight is sharded.
        ValueError: a shape, device, temperature or backend does not fit.
        IndexError: an id is out of range, on a CPU.

    On a GPU ids are not looked at, because that would wait for the device: in the kernels, one out
    of range has log-prob NaN (−inf, perhaps, in a row limited by ``allowed``).
    """
    hidden, weight, token_ids, bias, mask = as_tensors(hidden, weight, token_ids, bias, mask)
    _check(hidden, weight, bias)
    check_ids(token_ids, hidden.shape[:-1], "[...]", hidden.device)
    check_rows(hidden.shape[:-1], hidden.device, temperature, mask, allowed)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)

    chosen = backends.select("linear_logprobs", backend, hidden, weight, bias)
    values, entropies = chosen.run(
        hidden, weight, token_ids, bias, float(temperature), mask, allowed, entropy
    )
    return (values, entropies) if entropy else values


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_floats(name, tensor)
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name} is sharded (DTensor); call linear_logprobs inside the forward of the "
                f"module that fully_shard wraps, or pass {name}.full_tensor()"
            )
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be on {hidden.device} like hidden, got {tensor.device}; "
                f"use .to({hidden.device})"
            )
    if hidden.ndim == 0:
        raise ValueError("hidden must have shape [..., H], got a scalar")
    size = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != size or 0 in weight.shape:
        raise ValueError(
            f"weight must have shape [V, H] with H = {size} and V > 0, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")


def _run_reference(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    allowed: AllowedTokens | None,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    lead = hidden.shape[:-1]
    flat_mask = None if mask is None else mask.reshape(-1)
    flat_ids = ids.reshape(-1).long()
    if reads_values(hidden):
        check_range(flat_ids, flat_mask, None if allowed is None else allowed.ids, weight.shape[0])
    with timed_eagerly("linear_logprobs", "reference"):
        values, entropies = reference.linear_logprobs(
            hidden.reshape(lead.numel(), hidden.shape[-1]),
            weight,
            flat_ids,
            bias,
            temperature,
            flat_mask,
            allowed,
        )
    return values.reshape(lead), entropies.reshape(lead)


backends.register("linear_logprobs", "cpu", linear_logprobs_cpu.run, linear_logprobs_cpu.why_not)
backends.register("linear_logprobs", "reference", _run_reference, lambda hidden, weight, bias: None)
