"""The packed TRM on CPUs: one call into C++, without the GIL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops import SeenItems
from deeprec.ops.native import address
from deeprec.trm import packed_op
from deeprec.trm.request import Request

if TYPE_CHECKING:
    from deeprec.trm.packed import PackedTRM

__all__: list[str] = []


def _kernel_request(asked: Request) -> _C.TRMRequest:
    return _C.TRMRequest(
        asked.count,
        (
            address(asked.history),
            0 if asked.history is None else asked.history.shape[1],
            address(asked.lengths),
        ),
        address(asked.states),
        address(asked.preference),
        torch.get_num_threads(),
    )


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where the kernel writes, whatever torch's default dtype and device are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def _encode(packed: PackedTRM, asked: Request, *, states: bool) -> Tensor:
    out = _empty(asked.count, packed.sizes["hidden"])
    _C.trm_encode(
        packed.kernel_model,
        _kernel_request(asked),
        states=address(out) if states else 0,
        users=0 if states else address(out),
    )
    return out


def _history(packed: PackedTRM, asked: Request) -> Tensor:
    return _encode(packed, asked, states=True)


def _user_vectors(packed: PackedTRM, asked: Request) -> Tensor:
    return _encode(packed, asked, states=False)


def _retrieve(
    packed: PackedTRM, asked: Request, k: int, exclude: SeenItems | None, exclude_history: bool
) -> tuple[Tensor, Tensor]:
    values = _empty(asked.count, k)
    indices = _empty(asked.count, k, dtype=torch.int64)
    model = packed.kernel_model
    rows, prefilter = packed.kernel_index
    _C.trm_retrieve(
        model,
        _kernel_request(asked),
        rows,
        prefilter,
        k,
        (0, 0) if exclude is None else (exclude.offsets.data_ptr(), exclude.ids.data_ptr()),
        exclude_history,
        (values.data_ptr(), indices.data_ptr()),
    )
    return values, indices


def _why_not(*arguments: Any) -> str | None:
    for argument in arguments:
        if argument.device.type != "cpu":
            return f"tensors are on {argument.device}"
    return None


backends.register(packed_op.HISTORY, "cpu", _history, _why_not)
backends.register(packed_op.USER_VECTORS, "cpu", _user_vectors, _why_not)
backends.register(packed_op.RETRIEVE, "cpu", _retrieve, _why_not)
