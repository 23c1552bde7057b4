"""What the ops of a packed TRM mean: its eager module, and a search of its index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops import SeenItems, TopK
from deeprec.ops.topk import check_finite
from deeprec.trm import packed_op
from deeprec.trm.request import Request, search_items

if TYPE_CHECKING:
    from deeprec.trm.packed import PackedTRM

__all__: list[str] = []


@torch.no_grad()
def _history(packed: PackedTRM, asked: Request) -> Tensor:
    model = packed.module()
    with model.evaluating():
        return model.history_states(asked.history, asked.lengths)  # type: ignore[arg-type]


@torch.no_grad()
def _user_vectors(packed: PackedTRM, asked: Request) -> Tensor:
    model = packed.module()
    for name, rows in (("preference", asked.preference), ("states", asked.states)):
        if rows is not None:
            check_finite(name, rows)
    if asked.states is None:
        states = _history(packed, asked)
    else:
        states = asked.states
        if asked.history is not None and asked.lengths is not None:
            model.check_history(asked.history, asked.lengths)
    with model.evaluating():
        return model.with_preference(states, asked.preference)


def _retrieve(
    packed: PackedTRM, asked: Request, k: int, exclude: SeenItems | None, exclude_history: bool
) -> TopK:
    users = _user_vectors(packed, asked)
    return search_items(packed.index, users, asked, k, exclude, exclude_history)


def _why_not(*arguments: Any) -> str | None:
    # explain() may ask without a TRM.
    if any(getattr(argument, "from_file", False) for argument in arguments):
        return "a packed TRM from a file has no module behind it"
    return None


backends.register(packed_op.HISTORY, "reference", _history, _why_not)
backends.register(packed_op.USER_VECTORS, "reference", _user_vectors, _why_not)
backends.register(packed_op.RETRIEVE, "reference", _retrieve, _why_not)
