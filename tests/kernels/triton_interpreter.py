"""Triton's interpreter made trustworthy: exact bfloat16, typed comparisons, bounds, races.

Triton 3.9's interpreter multiplies bfloat16 as the integers that hold it, truncates casts to it,
gives comparisons the type of their operands, and reads or writes wherever a pointer leads. With
:func:`install` products of bfloat16 and tf32 are computed from values, as tensor cores do, other
bfloat16 arithmetic is refused (kernels must widen first), every lane of every load and store must
lie in one of the tensors that the launch was given, and no program may write what another program
of the launch reads or writes: they run in no order.

Only for a process that set ``TRITON_INTERPRET=1`` before it imported triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_memory: Memory | None = None


class Memory:
    """The tensors of a launch: what may be touched, and which program has touched what."""

    def __init__(self, extents: list[tuple[int, int]]) -> None:
        self.extents = extents
        merged: list[tuple[int, int]] = []  # tensors may overlap: views of one storage
        for low, high in sorted(extents):
            if merged and low <= merged[-1][1]:
                low, high = merged[-1][0], max(high, merged.pop()[1])  # noqa: PLW2901
            merged.append((low, high))
        self.lows = np.array([low for low, _ in merged], np.uint64)
        sizes = np.array([high - low for low, high in merged], np.int64)
        self.bases = np.concatenate([[0], np.cumsum(sizes)])
        # By byte: 0 for nobody, a program's number, or -1 for several.
        self.readers, self.writers = np.zeros((2, self.bases[-1]), np.int32)

    def check(self, addresses: np.ndarray, size: int, what: str, program: int) -> None:
        """Raises IndexError unless ``program`` may touch what is at the addresses."""
        inside = np.zeros(addresses.shape, bool)
        for low, high in self.extents:
            inside |= (addresses >= low) & (addresses + np.uint64(size) <= high)
        if not inside.all():
            outside = int((~inside).sum())
            raise IndexError(f"{what} out of bounds in {outside} of {inside.size} lanes")
        which = np.searchsorted(self.lows, addresses, "right") - 1
        at = self.bases[which] + (addresses - self.lows[which]).astype(np.int64)
        if _others(self.writers[at], program).any():
            raise IndexError(f"{what} of what another program writes")
        readers = self.readers[at]
        if what == "store":
            if _others(readers, program).any():
                raise IndexError("store to what another program reads")
            self.writers[at] = program
        else:
            self.readers[at] = np.where(_others(readers, program), -1, program)


def _others(programs: np.ndarray, program: int) -> np.ndarray:
    return (programs != 0) & (programs != program)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def truncated_to_tf32(values: np.ndarray) -> np.ndarray:
    """The worst that hardware may do to an operand: drop 13 bits of the mantissa."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any, *rest: Any) -> Any:
        if _is_bfloat16(source) and target.scalar == tl.bfloat16:
            return source
        if _is_bfloat16(source):
            source = TensorHandle(bfloat16_values(source.data), tl.float32)
            return source if target.scalar == tl.float32 else cast(self, source, target, *rest)
        if target.scalar == tl.bfloat16:
            return TensorHandle(bfloat16_bits(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, source, target, *rest)

    return cast


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, c: Any, precision: Any, *rest: Any) -> Any:
        def operand(handle: Any) -> Any:
            if _is_bfloat16(handle):
                return TensorHandle(bfloat16_values(handle.data), tl.float32)
            if handle.dtype.scalar == tl.float32 and str(precision).upper().endswith("TF32"):
                return TensorHandle(truncated_to_tf32(handle.data), tl.float32)
            return handle

        return original(self, operand(a), operand(b), c, precision, *rest)

    return dot


def _without_bfloat16(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *operands: Any) -> Any:
        if any(map(_is_bfloat16, operands)):
            raise TypeError("arithmetic on bfloat16: kernels must widen to float32 first")
        return original(self, *operands)

    return operation


def _compare(original: Callable[..., Any]) -> Callable[..., Any]:
    def compare(self: Any, left: Any, right: Any) -> Any:
        result = original(self, left, right)
        return TensorHandle(result.data.astype(np.bool_), tl.int1)

    return compare


def _check(builder: Any, pointers: Any, mask: Any, what: str) -> None:
    if _memory is None:
        return
    addresses, active = np.broadcast_arrays(pointers.data, mask.data)
    addresses = addresses[active.astype(bool)].astype(np.uint64)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
    _memory.check(addresses, size, what, (x * ny + y) * nz + z + 1)


def _access(original: Callable[..., Any], what: str, mask_at: int) -> Callable[..., Any]:
    def access(self: Any, pointers: Any, *rest: Any) -> Any:
        _check(self, pointers, rest[mask_at], what)
        return original(self, pointers, *rest)

    return access


def install() -> None:
    """Patch the interpreter of this process."""
    builder = InterpreterBuilder
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _cast(builder.create_fp_to_fp)
    builder.create_dot = _dot(builder.create_dot)
    builder.binary_op = _without_bfloat16(builder.binary_op)
    builder.unary_op = _without_bfloat16(builder.unary_op)
    for name in dir(builder):
        if name.startswith(("create_icmp", "create_fcmp")):
            setattr(builder, name, _compare(getattr(builder, name)))
    builder.create_masked_load = _access(builder.create_masked_load, "load", 0)
    builder.create_masked_store = _access(builder.create_masked_store, "store", 1)
    GridExecutor._init_args_hst = _launch(GridExecutor._init_args_hst)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor and the first behind its last element."""
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _launch(original: Callable[..., Any]) -> Callable[..., Any]:
    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _memory  # noqa: PLW0603
        on_host = original(self, *args, **kwargs)
        values = [*on_host[0], *on_host[1].values()]
        _memory = Memory([_extent(value) for value in values if isinstance(value, torch.Tensor)])
        return on_host

    return launch
