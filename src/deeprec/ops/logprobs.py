"""Log-prob of given tokens under logits: the operation policy-gradient losses read."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops.allowed import AllowedTokens
from deeprec.ops.reference import logprobs as reference

__all__ = ["gather_logprobs"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def gather_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    allowed: AllowedTokens | None = None,
    entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log_softmax(logits / temperature)`` at ``token_ids``, without writing the log-softmax.

    Results are float32 whatever comes in (float64 for float64 logits, on the reference backend).
    Differentiable in ``logits``, once. A NaN or +inf logit makes its row NaN; −inf is
    probability 0. An id outside its row's ``allowed`` ids has log-prob −inf.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64. Any strides: a slice of a
            larger tensor is not copied as long as its last dimension is contiguous.
        token_ids: integers ``[...]``, or ``[..., K]`` for K tokens a row, in ``[0, V)``.
        temperature: divides the logits; positive and finite.
        mask: bool ``[...]``, True = counted. Elsewhere values, entropy and gradients are 0 and
            neither ids nor logits are read, so −100 is a fine id there.
        allowed: permitted ids of every row (leading dimensions flattened); the softmax runs over
            them alone, as in constrained decoding.
        entropy: also return every row's entropy in nats, differentiable too.
        backend: "cpu", "reference" or None for the first that can run.

    Returns:
        Log-probs of the shape of ``token_ids``, or (log-probs, entropy ``[...]``).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device, temperature or backend does not fit.
        IndexError: an id is out of range.
    """
    logits, token_ids, mask = as_tensors(logits, token_ids, mask)
    check_floats("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V > 0, got {tuple(logits.shape)}")
    lead = logits.shape[:-1]
    if token_ids.ndim == logits.ndim:
        expected, many = (*lead, token_ids.shape[-1]), True
    else:
        expected, many = lead, False
    check_ids(token_ids, expected, "[...] or [..., K]", logits.device)
    check_rows(lead, logits.device, temperature, mask, allowed)

    ids = token_ids if many else token_ids[..., None]
    chosen = backends.select("gather_logprobs", backend, logits)
    values, entropies = chosen.run(logits, ids, float(temperature), mask, allowed, entropy)
    values = values if many else values[..., 0]
    return (values, entropies) if entropy else values


def as_tensors(*arrays: Tensor | np.ndarray | None) -> tuple[Any, ...]:
    """NumPy arrays as tensors that share their memory; tensors and None as they are."""
    return tuple(
        torch.from_numpy(array) if isinstance(array, np.ndarray) else array for array in arrays
    )


def check_floats(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is one of the supported float types."""
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}; "
            f"convert with .float()"
        )


def check_ids(ids: Tensor, expected: tuple[int, ...], form: str, device: torch.device) -> None:
    """Raise unless ids are integers of the expected shape and device."""
    if ids.dtype not in INTEGERS:
        raise TypeError(f"token_ids must be integers, got {ids.dtype}; convert with .long()")
    if tuple(ids.shape) != tuple(expected):
        raise ValueError(
            f"token_ids must have shape {form} = {list(expected)}, got {list(ids.shape)}"
        )
    if ids.device != device:
        raise ValueError(f"token_ids must be on {device}, got {ids.device}; use .to({device})")


def check_rows(
    lead: torch.Size,
    device: torch.device,
    temperature: float,
    mask: Tensor | None,
    allowed: AllowedTokens | None,
) -> None:
    """Raise unless the arguments that hold one entry a row fit the leading dimensions."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature}; "
            f"for greedy decoding use temperature 1, the ranking is the same"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = counted), got {mask.dtype}; use .bool()")
        if mask.shape != lead:
            raise ValueError(f"mask must have shape {list(lead)}, got {list(mask.shape)}")
        if mask.device != device:
            raise ValueError(f"mask must be on {device}, got {mask.device}; use .to({device})")
    if allowed is not None:
        if len(allowed) != lead.numel():
            raise ValueError(
                f"allowed must have one row for each of the {lead.numel()} rows, got {len(allowed)}"
            )
        if allowed.ids.device != device:
            raise ValueError(
                f"allowed must be on {device}, got {allowed.ids.device}; use .to({device})"
            )


def check_range(
    ids: Tensor, mask: Tensor | None, allowed: AllowedTokens | None, vocabulary: int
) -> None:
    """Raise IndexError unless every id that counts is in ``[0, vocabulary)``."""
    counted = {"token_ids": ids if mask is None else ids[mask]}
    if allowed is not None:
        counted["allowed"] = allowed.ids
    for name, values in counted.items():
        if values.numel() == 0:
            continue
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"{name} must be in [0, {vocabulary}), got {low if low < 0 else high}; "
                f"mark rows that do not count with mask=False"
            )


def _run_reference(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    mask: Tensor | None,
    allowed: AllowedTokens | None,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    lead, vocabulary = logits.shape[:-1], logits.shape[-1]
    flat_mask = None if mask is None else mask.reshape(-1)
    flat_ids = ids.reshape(lead.numel(), ids.shape[-1]).long()
    if reads_values(logits):
        check_range(flat_ids, flat_mask, allowed, vocabulary)
    with timed_eagerly("gather_logprobs", "reference"):
        values, entropies = reference.gather_logprobs(
            logits.reshape(lead.numel(), vocabulary), flat_ids, temperature, flat_mask, allowed
        )
    return values.reshape(ids.shape), entropies.reshape(lead)


def reads_values(tensor: Tensor) -> bool:
    """Whether values may be inspected: not while compiling, and not where it would synchronise."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu"


def timed_eagerly(op: str, backend: str) -> AbstractContextManager[None]:
    """:func:`deeprec.backends.timed`, except inside a compiled graph, which has no such calls."""
    return nullcontext() if torch.compiler.is_compiling() else backends.timed(op, backend)


backends.register("gather_logprobs", "reference", _run_reference, lambda logits: None)
