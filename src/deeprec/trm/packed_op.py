"""``trm_history``, ``trm_user_vectors`` and ``trm_retrieve`` as ``torch.library`` ops.

A graph cannot hold a TRM, so ops are told its name. They look it up when they run, check that it
is what was packed, and pick the backend: a compiled function follows a model that is trained on.
None is differentiable.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops import SeenItems, TopK
from deeprec.ops.watched import watched
from deeprec.trm.request import Request, check_exclusions

if TYPE_CHECKING:
    from deeprec.trm.packed import PackedTRM

__all__ = [
    "HISTORY",
    "RETRIEVE",
    "USER_VECTORS",
    "Asked",
    "history_states",
    "named",
    "retrieve",
    "user_vectors",
]

HISTORY, USER_VECTORS, RETRIEVE = "trm_history", "trm_user_vectors", "trm_retrieve"


class Asked(Protocol):
    """A packed TRM, or a module that packs itself."""

    name: str
    """Of :func:`named`."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Of :func:`deeprec.trm.packing.sizes`."""

    def packed(self) -> PackedTRM:
        """What answers now; RuntimeError where it cannot."""


_NAMED: WeakValueDictionary[str, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()


def named(trm: Asked) -> str:
    """A name under which ops find ``trm`` as long as it lives."""
    name = f"trm{next(_NUMBERS)}"
    _NAMED[name] = trm
    return name


# ---- what PackedTRM and PreferenceAwareTRM call; their docstrings say what it means ----


def history_states(trm: Asked, history: Any, lengths: Any, backend: str | None) -> Tensor:
    asked = Request.checked(trm.sizes, history, lengths)
    run = _op(HISTORY, _history, asked)
    states: Tensor = run(trm.name, asked.history, asked.lengths, backend or "")
    return states


def user_vectors(
    trm: Asked, history: Any, lengths: Any, preference: Any, states: Any, backend: str | None
) -> Tensor:
    asked = Request.checked(trm.sizes, history, lengths, preference, states)
    run = _op(USER_VECTORS, _user_vectors, asked)
    users: Tensor = run(trm.name, *_tensors(asked), backend or "")
    return users


def retrieve(
    trm: Asked,
    history: Tensor | np.ndarray | None,
    lengths: Tensor | np.ndarray | None,
    preference: Tensor | np.ndarray | None,
    k: int,
    *,
    exclude: SeenItems | None,
    exclude_history: bool,
    states: Tensor | None,
    backend: str | None,
) -> TopK:
    asked = Request.checked(trm.sizes, history, lengths, preference, states)
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    check_exclusions(asked, exclude, exclude_history)
    seen = (None, None) if exclude is None else (exclude.offsets, exclude.ids)
    run = _op(RETRIEVE, _retrieve, asked)
    return TopK(*run(trm.name, *_tensors(asked), *seen, exclude_history, k, backend or ""))


def _op(name: str, body: Callable[..., Any], asked: Request) -> Callable[..., Any]:
    """The op of that name, or its body where nobody looks on."""
    return getattr(torch.ops.deeprec, name) if watched(*asked.given()) else body


def _tensors(asked: Request) -> tuple[Tensor | None, ...]:
    return asked.history, asked.lengths, asked.states, asked.preference


# ---- the ops ----

_LIBRARY = torch.library.Library("deeprec", "FRAGMENT")
_ASKED = "str trm, Tensor? history, Tensor? lengths, Tensor? states, Tensor? preference"
_LIBRARY.define(f"{HISTORY}(str trm, Tensor history, Tensor lengths, str backend) -> Tensor")
_LIBRARY.define(f"{USER_VECTORS}({_ASKED}, str backend) -> Tensor")
_LIBRARY.define(
    f"{RETRIEVE}({_ASKED}, Tensor? offsets, Tensor? ids, bool exclude_history, SymInt k, "
    "str backend) -> (Tensor values, Tensor indices)"
)


def _find(name: str) -> Any:
    trm = _NAMED.get(name)
    if trm is None:
        raise RuntimeError(f"the TRM that this graph was compiled for ({name}) is gone")
    return trm


def _run(op: str, name: str, backend: str, asked: Request, *rest: Any) -> Any:
    packed = _find(name).packed()
    chosen = backends.select(op, backend or None, packed, *asked.given())
    with backends.timed(op, chosen.name):
        return chosen.run(packed, asked, *rest)


@torch.library.impl(_LIBRARY, HISTORY, "CompositeExplicitAutograd")
def _history(name: str, history: Tensor, lengths: Tensor, backend: str) -> Tensor:
    states: Tensor = _run(HISTORY, name, backend, Request(history, lengths))
    return states


@torch.library.impl(_LIBRARY, USER_VECTORS, "CompositeExplicitAutograd")
def _user_vectors(
    name: str,
    history: Tensor | None,
    lengths: Tensor | None,
    states: Tensor | None,
    preference: Tensor | None,
    backend: str,
) -> Tensor:
    asked = Request(history, lengths, states, preference)
    users: Tensor = _run(USER_VECTORS, name, backend, asked)
    return users


@torch.library.impl(_LIBRARY, RETRIEVE, "CompositeExplicitAutograd")
def _retrieve(
    name: str,
    history: Tensor | None,
    lengths: Tensor | None,
    states: Tensor | None,
    preference: Tensor | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    exclude_history: bool,
    k: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    asked = Request(history, lengths, states, preference)
    exclude = None if offsets is None or ids is None else SeenItems(offsets, ids)
    values, indices = _run(RETRIEVE, name, backend, asked, k, exclude, exclude_history)
    return values, indices


@torch.library.register_fake(f"deeprec::{HISTORY}", lib=_LIBRARY)
def _fake_history(name: str, history: Tensor, lengths: Tensor, backend: str) -> Tensor:
    return history.new_empty((history.shape[0], _find(name).sizes["hidden"]), dtype=torch.float32)


@torch.library.register_fake(f"deeprec::{USER_VECTORS}", lib=_LIBRARY)
def _fake_user_vectors(name: str, *rest: Any) -> Tensor:
    asked = Request(*rest[:4])
    like = asked.given()[0]
    return like.new_empty((asked.count, _find(name).sizes["hidden"]), dtype=torch.float32)


@torch.library.register_fake(f"deeprec::{RETRIEVE}", lib=_LIBRARY)
def _fake_retrieve(name: str, *rest: Any) -> tuple[Tensor, Tensor]:
    asked, k = Request(*rest[:4]), rest[-2]
    like = asked.given()[0]
    return (
        like.new_empty((asked.count, k), dtype=torch.float32),
        like.new_empty((asked.count, k), dtype=torch.int64),
    )
