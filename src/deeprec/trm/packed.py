"""The TRM as one fused call: history and preference in, ranked items out.

:class:`PackedTRM` is what :meth:`PreferenceAwareTRM.pack` returns. Its three ops are defined in
:mod:`deeprec.trm.packed_op`; their backends stand beside it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deeprec import _C
from deeprec.ops import ItemIndex, SeenItems, TopK
from deeprec.ops.topk import item_rows, prefilter_view
from deeprec.trm import packed_op
from deeprec.trm.packing import check_tensors, has_padding_row, pack_tensors, sizes

if TYPE_CHECKING:
    from deeprec.trm.model import PreferenceAwareTRM

__all__ = ["PackedTRM"]

DTYPES = (torch.float32, torch.bfloat16)
_T = TypeVar("_T")

FILE, INDEX_FILE = "trm_packed.safetensors", "trm_items.safetensors"
FORMAT = "deeprec.PackedTRM 3"


class _once(cached_property[_T]):
    """A cached property that one thread computes while others wait: Python's own has no lock."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        with instance._lock:
            return super().__get__(instance, owner)


class PackedTRM:
    """A TRM prepared for serving: everything that no request changes is computed once.

    That is the adaptor's output for every item's text, the normalised items as an
    :class:`~deeprec.ops.ItemIndex`, and the weights in the layout of the kernel. It follows the
    module it was made of: once that has changed, every method raises RuntimeError, and
    ``module.pack()`` gives the new state. What :meth:`load` returns has no module behind it.

    Safe to call from several threads; the number of threads of a call is that of torch. Requests
    may be part of a function under ``torch.compile(fullgraph=True)``.
    """

    def __init__(self, model: PreferenceAwareTRM, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        self._lock = RLock()
        self.dtype = dtype
        self.sizes = sizes(model.config)
        self.name = packed_op.named(self)
        self.eps: float = model.config.layer_norm_eps
        self.device = model.item_embedding.weight.device
        self._model: PreferenceAwareTRM | None = model
        self._version = model.version()

    # ---- what is computed once, at first use ----

    @_once
    def tensors(self) -> dict[str, Tensor]:
        """The kernel's tensors by name."""
        tensors = pack_tensors(self.module(), self.dtype)
        check_tensors(tensors, self.sizes, self.dtype)
        return tensors

    @_once
    def index(self) -> ItemIndex:
        """Items 1…n as rows 0…n−1, so that padding cannot be returned."""
        rows = self.module().item_embedding.weight.detach()[1:].float()
        zero = (rows == 0).all(1).nonzero()
        if len(zero):
            raise ValueError(
                f"item_embedding.weight: row {int(zero[0]) + 1} is zero, which has no cosine"
            )
        return ItemIndex(rows, metric="cosine")

    @_once
    def kernel_model(self) -> _C.TRMModel:
        """The kernel's view of :attr:`tensors`."""
        padding = has_padding_row(self.tensors)
        return _C.TRMModel(
            {**self.sizes, "half": self.dtype == torch.bfloat16, "padding_row": padding},
            self.eps,
            {name: tensor.data_ptr() for name, tensor in self.tensors.items()},
        )

    @_once
    def kernel_index(self) -> tuple[_C.ItemRows, _C.Prefilter]:
        """The kernel's view of :attr:`index`."""
        return item_rows(self.index.items), prefilter_view(self.index._table)

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

    def packed(self) -> PackedTRM:
        """Itself; RuntimeError once the module has changed."""
        if not self.fresh:
            raise RuntimeError("the TRM has changed since it was packed; call pack() again")
        return self

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
        return packed_op.history_states(self, history, lengths, backend)

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
        return packed_op.user_vectors(self, history, lengths, preference, states, backend)

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
            backend: "cuda", "triton", "cpu", "reference" or None for the first that can run.

        Returns:
            :class:`~deeprec.ops.TopK`; where fewer than k items are left, id -1 and score -inf.

        Raises:
            TypeError, ValueError, IndexError: naming the argument that does not fit.
            RuntimeError: the module has changed since it was packed.
        """
        return packed_op.retrieve(
            self,
            history,
            lengths,
            preference,
            k,
            exclude=exclude,
            exclude_history=exclude_history,
            states=states,
            backend=backend,
        )

    # ---- files ----

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write two files into ``folder``, for :meth:`load`: kernel tensors, and the item index."""
        self.packed()
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        temporary = target / f".{FILE}.{os.getpid()}"
        header = {
            "format": FORMAT,
            "sizes": json.dumps(self.sizes),
            "eps": repr(self.eps),
            "dtype": str(self.dtype).removeprefix("torch."),
            "checksum": _checksum(self.tensors),
            "items": _checksum({"items": self.index.items}),
        }
        self.index.save(target / INDEX_FILE)
        try:
            save_file(self.tensors, temporary, metadata=header)
            temporary.replace(target / FILE)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> PackedTRM:
        """Map what :meth:`save` wrote into memory; pages are shared between processes.

        ``verify=False`` trusts the content and skips the checksums, which read the files once.
        Raises FileNotFoundError or ValueError where it is not there or of another kind, naming the
        tensor that does not fit.
        """
        source = Path(folder) / FILE
        if not source.is_file():
            raise FileNotFoundError(
                f"no packed TRM at {source}: write one with pack().save(folder)"
            )
        try:
            with safe_open(source, framework="pt") as file:
                header = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{source} is damaged, pack and save it again: {error}") from None
        if header.get("format") != FORMAT:
            raise ValueError(f"{source} is no packed TRM of this version; pack and save it again")
        packed = cls.__new__(cls)
        packed._lock = RLock()
        packed.dtype = getattr(torch, header["dtype"])
        packed.sizes = json.loads(header["sizes"])
        packed.name = packed_op.named(packed)
        packed.eps = float(header["eps"])
        packed.device = torch.device("cpu")
        packed._model, packed._version = None, ()
        packed.tensors = load_file(source)
        try:
            check_tensors(packed.tensors, packed.sizes, packed.dtype)
        except ValueError as error:
            raise ValueError(f"{source} is damaged, pack and save it again: {error}") from None
        if verify and header.get("checksum") != _checksum(packed.tensors):
            raise ValueError(f"{source} is damaged, pack and save it again: its checksum differs")
        packed.index = ItemIndex.load(Path(folder) / INDEX_FILE, verify=verify)
        if verify and header.get("items") != _checksum({"items": packed.index.items}):
            raise ValueError(
                f"{source} and {INDEX_FILE} beside it are of different models; save both again"
            )
        return packed

    def __repr__(self) -> str:
        return (
            f"PackedTRM({self.sizes['n_items']} items x {self.sizes['hidden']}, "
            f"{str(self.dtype).removeprefix('torch.')} weights)"
        )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Tells contents apart."""
    checksum = 0
    for _, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
