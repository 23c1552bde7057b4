"""Tensors as the C++ and CUDA kernels take them: addresses and names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["address", "as_tensor", "contiguous", "dtype_name", "matrix", "rows_of"]


def address(tensor: Tensor | None) -> int:
    """Where the data of a tensor lies, 0 for None and for one without elements."""
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()


def dtype_name(tensor: Tensor) -> str:
    """ "float32" of torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def matrix(tensor: Tensor) -> tuple[int, str, int, int, int]:
    """Address, dtype, shape and row stride of a tensor whose rows have no gaps."""
    return (address(tensor), dtype_name(tensor), *tensor.shape, tensor.stride(0))


def as_tensor(value: Any) -> Tensor:
    """A tensor as it is, where torch's own moves it to the default device; else a new one."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The same tensor without gaps; None stays."""
    return None if tensor is None else tensor.contiguous()


def rows_of(tensor: Tensor) -> Tensor:
    """The same tensor, copied only where its rows have gaps."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
