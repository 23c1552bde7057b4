"""The packed TRM on CUDA: parameters in the layout of ``csrc/cuda/trm.h``, and its launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops import SeenItems, TopK, cuda
from deeprec.trm import packed_gpu, packed_op
from deeprec.trm.packing import has_padding_row, row_major_tensors
from deeprec.trm.request import Request, search_items

if TYPE_CHECKING:
    from deeprec.trm.packed import PackedTRM

__all__: list[str] = []

# A query's scores lie in registers, a row of a history in shared memory (csrc/cuda/trm.h).
LIMITS = {"max_length": 128, "hidden": 512, "n_experts": 32}


class _Model:
    """The kernels' view of a TRM, and the tensors it points into."""

    def __init__(self, packed: PackedTRM, kernels: Any) -> None:
        self.tensors = row_major_tensors(packed.module())
        padding = has_padding_row(self.tensors)
        self.native = kernels.TRMModel(
            {**packed.sizes, "padding_row": padding},
            packed.eps,
            {name: tensor.data_ptr() for name, tensor in self.tensors.items()},
        )


_MODELS: WeakKeyDictionary[PackedTRM, _Model] = WeakKeyDictionary()


def _history(packed: PackedTRM, asked: Request) -> Tensor:
    history, lengths = asked.history, asked.lengths
    assert history is not None and lengths is not None
    count, width = history.shape
    states = history.new_empty(count, packed.sizes["hidden"], dtype=torch.float32)
    if not count:
        return states
    starts = packed_gpu.item_starts(lengths, width)
    last = starts[1:] - 1
    with cuda.on(history) as target:
        model = _model(packed, target.kernels)
        size = target.kernels.trm_encode_workspace(model.native, count, width)
        workspace = torch.empty(size, dtype=torch.uint8, device=history.device)
        target.kernels.trm_encode(
            model.native,
            shape=(count, width),
            histories=(history.data_ptr(), starts.data_ptr(), last.data_ptr()),
            states=states.data_ptr(),
            workspace=(workspace.data_ptr(), size),
            stream=target.stream,
        )
    return states


def _user_vectors(packed: PackedTRM, asked: Request) -> Tensor:
    states = asked.states if asked.states is not None else _history(packed, asked)
    users = torch.empty_like(states)
    if not len(states):
        return users
    preference = asked.preference
    with cuda.on(states) as target:
        model = _model(packed, target.kernels)
        size = target.kernels.trm_fuse_workspace(model.native, len(states))
        workspace = torch.empty(size, dtype=torch.uint8, device=states.device)
        target.kernels.trm_fuse(
            model.native,
            count=len(states),
            states=states.data_ptr(),
            preference=0 if preference is None else preference.data_ptr(),
            users=users.data_ptr(),
            workspace=(workspace.data_ptr(), size),
            stream=target.stream,
        )
    return users


def _retrieve(
    packed: PackedTRM, asked: Request, k: int, exclude: SeenItems | None, exclude_history: bool
) -> TopK:
    users = _user_vectors(packed, asked)
    return search_items(packed.index, users, asked, k, exclude, exclude_history)


def _model(packed: PackedTRM, kernels: Any) -> _Model:
    """Made at the first call; a packed TRM never changes."""
    model = _MODELS.get(packed)
    if model is None:
        model = _MODELS[packed] = _Model(packed, kernels)
    return model


def _why_not(*arguments: PackedTRM | Tensor) -> str | None:
    for argument in arguments:
        if not isinstance(argument, Tensor) and argument.dtype != torch.float32:
            return f"weights are {argument.dtype}; the CUDA kernels keep float32"
    return packed_gpu.why_not(arguments, LIMITS, cuda.why_not)


backends.register(packed_op.HISTORY, "cuda", _history, _why_not)
backends.register(packed_op.USER_VECTORS, "cuda", _user_vectors, _why_not)
backends.register(packed_op.RETRIEVE, "cuda", _retrieve, _why_not)
