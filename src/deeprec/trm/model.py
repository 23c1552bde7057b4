"""The preference-aware TRM: a history and a preference in, a ranked catalogue out.

Architecture: Zheng et al., arXiv 2505.16810, §3.1. Module and parameter names are those of the
published checkpoints, so :meth:`PreferenceAwareTRM.from_reference` loads them unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from deeprec.ops import SeenItems, TopK
from deeprec.trm import packed_op
from deeprec.trm.changes import ParameterWatch
from deeprec.trm.config import TRMConfig
from deeprec.trm.convolution import fourier_matrices, multiply_spectra
from deeprec.trm.history_states import HistoryStates
from deeprec.trm.layers import INIT_STD, Dropout, Encoder, MoEAdaptor, Rows
from deeprec.trm.packed import PackedTRM
from deeprec.trm.packing import sizes
from deeprec.trm.request import as_history

# What the paper's code puts into the column of the padding row.
PADDING_SCORE = -1e9
CHECKPOINT = "trm.safetensors"


class PreferenceAwareTRM(nn.Module):
    """Ranks items by the cosine of a user vector and the item embeddings.

    Histories are item ids 1…n, int64 ``[B, L]`` with L up to ``config.max_length``, oldest first
    and padded with 0 on the right; lengths are int64 ``[B]``, from 1 to L. A preference is a
    sentence embedding, float32 ``[B, P]``; None stands for no preference, which is the same as
    zeros.

    The module itself is plain torch and differentiable. Inference runs through :meth:`pack`, the
    same arithmetic in one fused call: :meth:`retrieve` always, :meth:`user_vectors` in evaluation
    mode under ``torch.no_grad()``.
    """

    to_spectrum: Tensor
    from_spectrum: Tensor

    def __init__(self, config: TRMConfig, item_texts: Tensor | None = None) -> None:
        """``item_texts`` float32 ``[n_items, P]`` are the frozen text vectors of items 1…n."""
        super().__init__()
        self.config = config
        hidden, rows = config.hidden, config.n_items + 1
        self.item_embedding = nn.Embedding(rows, hidden, padding_idx=0)
        self.item_plm_embedding = nn.Embedding(rows, config.text_dim, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_length, hidden)
        self.moe_adaptor = MoEAdaptor(config)
        self.complex_weight = nn.Parameter(torch.empty(1, config.max_length // 2 + 1, hidden, 2))
        to_spectrum, from_spectrum = fourier_matrices(config.max_length)
        self.register_buffer("to_spectrum", to_spectrum, persistent=False)
        self.register_buffer("from_spectrum", from_spectrum, persistent=False)
        self.item_gating = nn.Linear(hidden, 1)
        self.fusion_gating = nn.Linear(hidden, 1)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)
        self.trm_encoder = Encoder(config)
        self.OutLayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self._packs: dict[torch.dtype, PackedTRM] = {}
        self._watch: ParameterWatch | None = None
        self.name = packed_op.named(self)
        self._initialise(item_texts)

    def _initialise(self, item_texts: Tensor | None) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.complex_weight, std=INIT_STD)
        with torch.no_grad():
            # Near the identity: a filter near zero would hide the items behind their positions
            # and cost several epochs.
            self.complex_weight[..., 0] += 1.0
            self.item_embedding.weight[0] = 0.0
            texts = self.item_plm_embedding.weight
            texts.requires_grad_(False).zero_()
            if item_texts is not None:
                if item_texts.shape != texts[1:].shape:
                    raise ValueError(
                        f"item_texts: expected shape {tuple(texts[1:].shape)} (n_items, text_dim), "
                        f"got {tuple(item_texts.shape)}; pass one vector per item, without padding"
                    )
                texts[1:] = item_texts

    @classmethod
    def from_reference(
        cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
    ) -> PreferenceAwareTRM:
        """Load a published checkpoint: its options and its parameters, names unchanged."""
        model = cls(TRMConfig.from_reference(config))
        model.load_state_dict(dict(state_dict))
        return model.eval()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``folder/trm.safetensors``: the parameters, and the configuration in its header.

        One file, written under a temporary name and renamed: it is whole or not there.
        """
        target = Path(folder) / CHECKPOINT
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{CHECKPOINT}.{os.getpid()}")
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        try:
            save_file(state, temporary, metadata={"config": json.dumps(asdict(self.config))})
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PreferenceAwareTRM:
        """What :meth:`save` wrote, in evaluation mode.

        Raises FileNotFoundError when there is none, ValueError for another kind of file.
        """
        source = Path(folder) / CHECKPOINT
        if not source.is_file():
            raise FileNotFoundError(f"no trained TRM at {source}: train one, or fix the path")
        try:
            with safe_open(source, framework="pt") as file:
                metadata = file.metadata() or {}
            state = load_file(source)
        except SafetensorError as error:
            raise ValueError(f"{source} is damaged: {error}; train the TRM again") from None
        if "config" not in metadata:
            raise ValueError(
                f"{source} has no TRM configuration in its header; load a published checkpoint "
                "with PreferenceAwareTRM.from_reference(config, state_dict)"
            )
        try:
            config = TRMConfig(**json.loads(metadata["config"]))
        except TypeError as error:
            raise ValueError(f"{source} is of another version of the TRM: {error}") from None
        model = cls(config)
        model.load_state_dict(state)
        return model.eval()

    def history_states(self, history: Tensor, lengths: Tensor) -> Tensor:
        """What the encoder makes of histories alone, float32 ``[B, H]``, differentiable.

        It does not depend on the preference, so a conversation needs it once.
        """
        history, lengths = self.check_history(history, lengths)
        # The convolution runs over the model's length, all else over real items alone.
        padded = F.pad(history, (0, self.config.max_length - history.shape[1]))
        rows = Rows(lengths, int(lengths.max()) if len(lengths) else 1)
        states = self._contextual_convolution(padded, rows) + self.position_embedding(rows.position)
        return self.trm_encoder(self.dropout(self.LayerNorm(states)), rows)

    def user_vectors(
        self, history: Tensor, lengths: Tensor, preference: Tensor | None = None
    ) -> Tensor:
        """User vectors, float32 ``[B, H]``, not normalised."""
        if torch.is_grad_enabled() or self.training:
            return self.with_preference(self.history_states(history, lengths), preference)
        return packed_op.user_vectors(self, history, lengths, preference, None, None)

    def with_preference(self, states: Tensor, preference: Tensor | None) -> Tensor:
        """User vectors ``[B, H]`` from :meth:`history_states` and preferences ``[B, P]``."""
        if preference is not None:
            expected = (len(states), self.config.text_dim)
            if preference.shape != expected:
                raise ValueError(
                    f"preference: expected shape {expected} (batch, text_dim), got "
                    f"{tuple(preference.shape)}; use the sentence encoder the TRM was trained with"
                )
            states = states + self.moe_adaptor(preference)
        return self.OutLayerNorm(states)

    def retrieve(
        self,
        history: Tensor,
        lengths: Tensor,
        preference: Tensor | None,
        k: int,
        *,
        exclude: SeenItems | None = None,
        exclude_history: bool = False,
        cache: HistoryStates | None = None,
        backend: str | None = None,
    ) -> TopK:
        """The k best items of every row, ids ``[B, k]`` and cosine scores, best first.

        ``exclude`` holds item ids that must not be returned, ``exclude_history`` adds those of
        the history; where fewer than k items are left, the id is -1 and the score -inf. With a
        ``cache`` histories that it knows cost nothing. Dropout is off, whatever the mode; not
        differentiable. Arguments and errors: :meth:`PackedTRM.retrieve`.
        """
        states = None if cache is None else cache.of(self.pack(), history, lengths)
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

    def pack(self, dtype: torch.dtype = torch.float32) -> PackedTRM:
        """The parameters prepared for inference; the same object until they change.

        ``dtype`` torch.bfloat16 keeps weights in half the memory and multiplies them with the
        machine's bf16 instructions where it has them: faster, and less exact
        (docs/BENCHMARKS.md has the ranking loss on a trained model).
        """
        packed = self._packs.get(dtype)
        if packed is None or not packed.fresh:
            packed = self._packs[dtype] = PackedTRM(self, dtype)
        return packed

    @property
    def sizes(self) -> dict[str, int]:
        """What requests must fit."""
        return sizes(self.config)

    def packed(self) -> PackedTRM:
        """:meth:`pack` in float32: what answers requests."""
        return self.pack()

    def version(self) -> tuple[int, ...]:
        """Another value whenever parameters have changed; see :class:`ParameterWatch`."""
        if self._watch is None:
            self._watch = ParameterWatch(self)
        return self._watch.state()

    def train(self, mode: bool = True) -> PreferenceAwareTRM:
        """Training or evaluation mode; training drops what was derived from the parameters."""
        if mode:
            self._packs = {}
        return super().train(mode)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while, without dropping anything."""
        modules = [module for module in self.modules() if module.training]
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module in modules:
                module.training = True

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles derive their own.
        return {**self.__dict__, "_packs": {}, "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.name = packed_op.named(self)

    def scores(self, history: Tensor, lengths: Tensor, preference: Tensor | None = None) -> Tensor:
        """Cosine scores of every row of the item table, float32 ``[B, n_items + 1]``.

        Column 0, the padding row, is -1e9.
        """
        users = F.normalize(self.user_vectors(history, lengths, preference), dim=-1)
        scores = users @ F.normalize(self.item_embedding.weight, dim=-1).T
        scores[:, 0] = PADDING_SCORE
        return scores

    def _contextual_convolution(self, history: Tensor, rows: Rows) -> Tensor:
        """Ids and texts mixed over the sequence, per channel; real positions, ``[N, H]``."""
        by_position = history.T
        # Every distinct item goes through the adaptor once.
        items, where = by_position.unique(return_inverse=True)
        texts = F.embedding(where, self.moe_adaptor(self.item_plm_embedding(items)))
        id_spectrum = self._spectrum(self.item_embedding(by_position))
        kernel = self.complex_weight.permute(3, 1, 0, 2).flatten(0, 1)
        spectra = kernel, self._spectrum(texts)
        width = rows.real.shape[1]
        filtered, fused = (
            rows.take(self._sequence(multiply_spectra(id_spectrum, other))[:, :width])
            for other in spectra
        )
        return 2.0 * (
            filtered * torch.sigmoid(self.item_gating(filtered))
            + fused * torch.sigmoid(self.fusion_gating(fused))
        )

    def _spectrum(self, sequence: Tensor) -> Tensor:
        """``[L, B, H]`` → ``[F, B, H]``."""
        return (self.to_spectrum @ sequence.flatten(1)).unflatten(1, sequence.shape[1:])

    def _sequence(self, spectrum: Tensor) -> Tensor:
        """``[F, B, H]`` → ``[B, L, H]``."""
        sequence = (self.from_spectrum @ spectrum.flatten(1)).unflatten(1, spectrum.shape[1:])
        return sequence.transpose(0, 1)

    def check_history(self, history: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Both as tensors, once they are what :meth:`PackedTRM.retrieve` describes."""
        history, lengths = as_history(history, lengths, self.config.max_length)
        if len(lengths) and (int(lengths.min()) < 1 or int(lengths.max()) > history.shape[1]):
            raise ValueError(
                f"lengths: expected values from 1 to {history.shape[1]} (the width of history), "
                f"got {int(lengths.min())} to {int(lengths.max())}; leave out users without history"
            )
        real = torch.arange(history.shape[1], device=history.device) < lengths[:, None]
        if bool(((history > 0) != real).any()) or bool((history > self.config.n_items).any()):
            raise IndexError(
                f"history: expected item ids 1 … {self.config.n_items} up to each row's length and "
                "0 from there on; pad on the right"
            )
        return history, lengths
