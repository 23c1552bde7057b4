"""The TRM as one fused call: history and preference in, ranked items out.

:class:`PackedTRM` is what :meth:`PreferenceAwareTRM.pack` returns. Its three ops,
``trm_history``, ``trm_user_vectors`` and ``trm_retrieve``, have two backends: ``cpu``, one call
into C++ without the GIL, and ``reference``, the eager module.
"""

from __future__ import annotations

import json
import os
import zlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops import ItemIndex, SeenItems, TopK
from deeprec.ops.topk import item_rows, prefilter_view
from deeprec.trm.packing import pack_tensors, sizes

if TYPE_CHECKING:
    from deeprec.trm.model import PreferenceAwareTRM

__all__ = ["HISTORY", "RETRIEVE", "USER_VECTORS", "PackedTRM"]

HISTORY, USER_VECTORS, RETRIEVE = "trm_history", "trm_user_vectors", "trm_retrieve"
DTYPES = (torch.float32, torch.bfloat16)
FILE, INDEX_FILE = "trm_packed.safetensors", "trm_items.safetensors"
FORMAT = "deeprec.PackedTRM 1"


class PackedTRM:
    """A TRM prepared for serving: everything that no request changes is computed once.

    That is the adaptor's output for every item's text, the normalised items as an
    :class:`~deeprec.ops.ItemIndex`, and the weights in the layout of the kernel. It follows the
    module it was made of: once that has changed, every method raises RuntimeError, and
    ``module.pack()`` gives the new state. What :meth:`load` returns has no module behind it.

    Safe to call from several threads; the number of threads of a call is that of torch.
    """

    def __init__(self, model: PreferenceAwareTRM, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        self.dtype = dtype
        self.sizes = sizes(model)
        self.eps = model.config.layer_norm_eps
        self.device = model.item_embedding.weight.device
        self._model: PreferenceAwareTRM | None = model
        self._version = model.version()

    # ---- what is computed once, at first use ----

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The kernel's tensors by name."""
        return pack_tensors(self.module(), self.dtype)

    @cached_property
    def index(self) -> ItemIndex:
        """Items 1…n as rows 0…n−1, so that padding cannot be returned."""
        return ItemIndex(self.module().item_embedding.weight.detach()[1:], metric="cosine")

    @cached_property
    def kernel_model(self) -> _C.TRMModel:
        """The kernel's view of :attr:`tensors`."""
        padding = any(bool(self.tensors[name][0].any()) for name in ("items", "texts"))
        return _C.TRMModel(
            {**self.sizes, "half": self.dtype == torch.bfloat16, "padding_row": padding},
            self.eps,
            {name: tensor.data_ptr() for name, tensor in self.tensors.items()},
        )

    def module(self) -> PreferenceAwareTRM:
        """What was packed; RuntimeError where that is not known."""
        if self._model is None:
            raise RuntimeError("this packed TRM has no module behind it; load the TRM and pack it")
        return self._model

    @property
    def from_file(self) -> bool:
        """Whether no module is behind it."""
        return self._model is None

    @property
    def fresh(self) -> bool:
        """Whether the module is still what was packed."""
        return self._model is None or self._model.version() == self._version

    def _check_fresh(self) -> None:
        if not self.fresh:
            raise RuntimeError("the TRM has changed since it was packed; call pack() again")

    @property
    def nbytes(self) -> int:
        """Memory of tensors and index, the module's own item table included."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) + self.index.nbytes

    # ---- requests ----

    def history_states(
        self,
        history: Tensor | np.ndarray,
        lengths: Tensor | np.ndarray,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """What the encoder makes of histories, float32 ``[B, H]``: for ``states`` below.

        Arguments and errors as :meth:`retrieve`.
        """
        self._check_fresh()
        asked = Request(self, history, lengths)
        chosen = backends.select(HISTORY, backend, self, asked.history)
        with backends.timed(HISTORY, chosen.name):
            return _tensor(chosen.run(self, asked))

    def user_vectors(
        self,
        history: Tensor | np.ndarray | None,
        lengths: Tensor | np.ndarray | None,
        preference: Tensor | np.ndarray | None = None,
        *,
        states: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """User vectors, float32 ``[B, H]``, not normalised. Arguments as :meth:`retrieve`."""
        self._check_fresh()
        asked = Request(self, history, lengths, preference, states)
        chosen = backends.select(USER_VECTORS, backend, self, *asked.given())
        with backends.timed(USER_VECTORS, chosen.name):
            return _tensor(chosen.run(self, asked))

    def retrieve(
        self,
        history: Tensor | np.ndarray | None,
        lengths: Tensor | np.ndarray | None,
        preference: Tensor | np.ndarray | None,
        k: int,
        *,
        exclude: SeenItems | None = None,
        exclude_history: bool = False,
        states: Tensor | None = None,
        backend: str | None = None,
    ) -> TopK:
        """The k best items of every user, ids ``[B, k]`` and cosine scores, best first.

        Args:
            history: item ids 1…n, int64 ``[B, L]``, oldest first, 0 on the right.
            lengths: int64 ``[B]``, from 1 to L.
            preference: float32 ``[B, P]``, or None for no preference.
            k: at least 1.
            exclude: item ids that must not be returned, per user.
            exclude_history: nor what is in the history.
            states: float32 ``[B, H]`` from :meth:`history_states`; histories are not encoded
                then, and may be None unless they are excluded. What remains, a later turn of the
                same conversations, costs the preference and the search.
            backend: "cpu", "reference" or None for the first that can run.

        Returns:
            :class:`~deeprec.ops.TopK`; where fewer than k items are left, id -1 and score -inf.

        Raises:
            TypeError, ValueError, IndexError: naming the argument that does not fit.
            RuntimeError: the module has changed since it was packed.
        """
        self._check_fresh()
        asked = Request(self, history, lengths, preference, states)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be an integer of at least 1, got {k!r}")
        if exclude is not None and (
            not isinstance(exclude, SeenItems) or len(exclude) != len(asked)
        ):
            raise ValueError(
                f"exclude: expected a SeenItems of {len(asked)} rows, got "
                + (f"{len(exclude)} rows" if isinstance(exclude, SeenItems) else repr(exclude))
            )
        if exclude_history and asked.history is None:
            raise ValueError("exclude_history: needs history and lengths beside states")
        chosen = backends.select(RETRIEVE, backend, self, *asked.given())
        with backends.timed(RETRIEVE, chosen.name):
            found = chosen.run(self, asked, k, exclude, exclude_history)
        return TopK(*found)

    # ---- files ----

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write two files into ``folder``, for :meth:`load`: kernel tensors, and the item index."""
        self._check_fresh()
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        temporary = target / f".{FILE}.{os.getpid()}"
        header = {
            "format": FORMAT,
            "sizes": json.dumps(self.sizes),
            "eps": repr(self.eps),
            "dtype": str(self.dtype).removeprefix("torch."),
            "items": _checksum(self.index),
        }
        self.index.save(target / INDEX_FILE)
        try:
            save_file(self.tensors, temporary, metadata=header)
            temporary.replace(target / FILE)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PackedTRM:
        """Map what :meth:`save` wrote into memory; pages are shared between processes.

        Raises FileNotFoundError or ValueError where it is not there or of another kind.
        """
        source = Path(folder) / FILE
        if not source.is_file():
            raise FileNotFoundError(
                f"no packed TRM at {source}: write one with pack().save(folder)"
            )
        with safe_open(source, framework="pt") as file:
            header = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise ValueError(f"{source} is no packed TRM of this version; pack and save it again")
        packed = cls.__new__(cls)
        packed.dtype = getattr(torch, header["dtype"])
        packed.sizes = json.loads(header["sizes"])
        packed.eps = float(header["eps"])
        packed.device = torch.device("cpu")
        packed._model, packed._version = None, ()
        packed.tensors = load_file(source)
        packed.index = ItemIndex.load(Path(folder) / INDEX_FILE)
        if header.get("items") != _checksum(packed.index):
            raise ValueError(
                f"{source} and {INDEX_FILE} beside it are of different models; save both again"
            )
        return packed

    def __repr__(self) -> str:
        return (
            f"PackedTRM({self.sizes['n_items']} items x {self.sizes['hidden']}, "
            f"{str(self.dtype).removeprefix('torch.')} weights)"
        )


class Request:
    """Arguments of a request once they fit: contiguous tensors of the right type."""

    def __init__(
        self,
        packed: PackedTRM,
        history: Tensor | np.ndarray | None,
        lengths: Tensor | np.ndarray | None,
        preference: Tensor | np.ndarray | None = None,
        states: Tensor | None = None,
    ) -> None:
        size = packed.sizes
        self.history, self.lengths = _history(history, lengths, size["max_length"], states)
        self.states = None
        if states is not None:
            count = len(states) if self.history is None else len(self.history)
            self.states = _matrix(
                "states", states, count, size["hidden"], "history_states gives it"
            )
        self.count = len(self.states if self.history is None else self.history)  # type: ignore[arg-type]
        self.preference = None
        if preference is not None:
            way_out = "use the sentence encoder the TRM was trained with"
            self.preference = _matrix(
                "preference", preference, self.count, size["text_dim"], way_out
            )

    def __len__(self) -> int:
        return self.count

    def given(self) -> list[Tensor]:
        tensors = (self.history, self.preference, self.states)
        return [tensor for tensor in tensors if tensor is not None]

    def kernel_request(self) -> _C.TRMRequest:
        return _C.TRMRequest(
            self.count,
            (
                _pointer(self.history),
                0 if self.history is None else self.history.shape[1],
                _pointer(self.lengths),
            ),
            _pointer(self.states),
            _pointer(self.preference),
            torch.get_num_threads(),
        )


def _history(
    history: Any, lengths: Any, limit: int, states: Any
) -> tuple[Tensor | None, Tensor | None]:
    if history is None and lengths is None and states is not None:
        return None, None
    if history is None or lengths is None:
        raise ValueError("history and lengths: expected both, or states without them")
    ids, counts = torch.as_tensor(history), torch.as_tensor(lengths)
    for name, tensor in (("history", ids), ("lengths", counts)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {tensor.dtype}; use .long()")
    if ids.ndim != 2 or not 1 <= ids.shape[1] <= limit:
        raise ValueError(
            f"history: expected item ids [B, L] with L from 1 to {limit}, got shape "
            f"{tuple(ids.shape)}; keep the last {limit} items"
        )
    if counts.shape != ids.shape[:1]:
        raise ValueError(f"lengths: expected shape ({len(ids)},), got {tuple(counts.shape)}")
    return ids.contiguous(), counts.contiguous()


def _matrix(name: str, value: Any, rows: int, columns: int, way_out: str) -> Tensor:
    tensor = torch.as_tensor(value).detach()
    if tensor.shape != (rows, columns):
        raise ValueError(
            f"{name}: expected shape ({rows}, {columns}), got {tuple(tensor.shape)}; {way_out}"
        )
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {tensor.dtype}; use .float()")
    return tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tensor(result: Any) -> Tensor:
    assert isinstance(result, Tensor)
    return result


def _checksum(index: ItemIndex) -> str:
    """Tells item tables apart."""
    return f"{zlib.crc32(index.items.numpy().data):08x}"


# ---- backends ----


def _encode(packed: PackedTRM, asked: Request, *, states: bool) -> Tensor:
    out = torch.empty(asked.count, packed.sizes["hidden"])
    address = out.data_ptr()
    _C.trm_encode(
        packed.kernel_model,
        asked.kernel_request(),
        states=address if states else 0,
        users=0 if states else address,
    )
    return out


def _history_cpu(packed: PackedTRM, asked: Request) -> Tensor:
    return _encode(packed, asked, states=True)


def _user_vectors_cpu(packed: PackedTRM, asked: Request) -> Tensor:
    return _encode(packed, asked, states=False)


def _retrieve_cpu(
    packed: PackedTRM, asked: Request, k: int, exclude: SeenItems | None, exclude_history: bool
) -> tuple[Tensor, Tensor]:
    values = torch.empty(asked.count, k)
    indices = torch.empty(asked.count, k, dtype=torch.int64)
    model, index = packed.kernel_model, packed.index
    _C.trm_retrieve(
        model,
        asked.kernel_request(),
        item_rows(index.items),
        prefilter_view(index._table),
        k,
        (0, 0) if exclude is None else (exclude.offsets.data_ptr(), exclude.ids.data_ptr()),
        exclude_history,
        (values.data_ptr(), indices.data_ptr()),
    )
    return values, indices


@torch.no_grad()
def _history_reference(packed: PackedTRM, asked: Request) -> Tensor:
    model = packed.module()
    with model.evaluating():
        return model.history_states(asked.history, asked.lengths)  # type: ignore[arg-type]


@torch.no_grad()
def _user_vectors_reference(packed: PackedTRM, asked: Request) -> Tensor:
    model = packed.module()
    states = asked.states if asked.states is not None else _history_reference(packed, asked)
    with model.evaluating():
        return model.with_preference(states, asked.preference)


def _retrieve_reference(
    packed: PackedTRM, asked: Request, k: int, exclude: SeenItems | None, exclude_history: bool
) -> TopK:
    users = _user_vectors_reference(packed, asked)
    rows = excluded_rows(asked, exclude, exclude_history)
    found = packed.index.search(users, k, rows)
    return TopK(found.values, torch.where(found.indices < 0, -1, found.indices + 1))


def excluded_rows(
    asked: Request, exclude: SeenItems | None, exclude_history: bool
) -> SeenItems | None:
    """Rows of the index: ids less one, of the history as well if asked for."""
    if exclude_history:
        assert asked.history is not None
        seen = SeenItems.from_padded(asked.history)
        if exclude is not None:
            rows = [
                [*a.tolist(), *b.tolist()] for a, b in zip(_rows(exclude), _rows(seen), strict=True)
            ]
            seen = SeenItems.from_lists(rows).to(asked.history.device)
        exclude = seen
    return None if exclude is None else SeenItems(exclude.offsets, exclude.ids - 1)


def _rows(seen: SeenItems) -> tuple[Tensor, ...]:
    return seen.ids.split(seen.offsets.diff().tolist())


def _why_not_cpu(*arguments: Any) -> str | None:
    for argument in arguments:
        if isinstance(argument, (PackedTRM, Tensor)) and argument.device.type != "cpu":
            return f"tensors are on {argument.device}"
    return None


def _why_not_reference(*arguments: Any) -> str | None:
    for argument in arguments:
        if isinstance(argument, PackedTRM) and argument.from_file:
            return "a packed TRM from a file has no module behind it"
    return None


for _op, _cpu, _reference in (
    (HISTORY, _history_cpu, _history_reference),
    (USER_VECTORS, _user_vectors_cpu, _user_vectors_reference),
    (RETRIEVE, _retrieve_cpu, _retrieve_reference),
):
    backends.register(_op, "cpu", _cpu, _why_not_cpu)
    backends.register(_op, "reference", _reference, _why_not_reference)
