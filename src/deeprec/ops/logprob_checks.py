"""What gather_logprobs and linear_logprobs demand of their arguments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops.allowed import AllowedTokens

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
    if not 1e-30 <= temperature <= 1e30:  # beyond it 1 / temperature leaves float32's range
        raise ValueError(
            f"temperature must be positive and finite (1e-30 to 1e30), got {temperature}; "
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
    ids: Tensor, mask: Tensor | None, permitted: Tensor | None, vocabulary: int
) -> None:
    """Raise IndexError unless every id that counts is in ``[0, vocabulary)``."""
    counted = {"token_ids": ids if mask is None else ids[mask]}
    if permitted is not None:
        counted["allowed"] = permitted
    for name, values in counted.items():
        if values.numel() == 0:
            continue
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"{name} must be in [0, {vocabulary}), got {low if low < 0 else high}; "
                f"mark rows that do not count with mask=False"
            )


def reads_values(tensor: Tensor) -> bool:
    """Whether values may be inspected: not while compiling, and not where it would synchronise."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu"


def timed_eagerly(op: str, backend: str) -> AbstractContextManager[None]:
    """:func:`deeprec.backends.timed`, except inside a compiled graph, which has no such calls."""
    return nullcontext() if torch.compiler.is_compiling() else backends.timed(op, backend)
