"""What the fused TRM is compared with: the same model in plain torch, at its best settings."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from deeprec.trm import PreferenceAwareTRM
from deeprec.trm.convolution import multiply_spectra
from deeprec.trm.layers import Encoder, EncoderLayer

__all__ = ["CompiledTRM", "adapted", "authors_path", "eager_module", "padded_states", "recbole_ms"]

# A Python that has RecBole 1.2.1, which installs up to Python 3.11 with setuptools < 81.
RECBOLE_PYTHON = "RECBOLE_PYTHON"


def ranked(users: Tensor, items: Tensor, history: Tensor, k: int) -> Any:
    """Scores of normalised items, what is in the history and the padding left out."""
    scores = F.normalize(users, dim=1) @ items.T
    return scores.scatter_(1, history, -torch.inf)[:, 1:].topk(k)


def padded_encoder(encoder: Encoder, states: Tensor, lengths: Tensor) -> Tensor:
    """The encoder over ``[B, T, H]``, padding included; the last layer at one position."""
    padding = (torch.arange(states.shape[1]) >= lengths[:, None])[:, None, None]
    mask = states.new_zeros(padding.shape).masked_fill_(padding, torch.finfo(states.dtype).min)

    def apply(layer: EncoderLayer, queries: Tensor, context: Tensor) -> Tensor:
        attention = layer.multi_head_attention
        q, k, v = (
            linear(x).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
            for linear, x in (
                (attention.query, queries),
                (attention.key, context),
                (attention.value, context),
            )
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        heads = (attention.dropout(scores.softmax(dim=-1)) @ v).transpose(1, 2).flatten(2)
        attended = attention.dropout(attention.out_linear(heads))
        return layer.feed_forward(attention.LayerNorm(queries + attended))

    *layers, last_layer = (cast(EncoderLayer, layer) for layer in encoder.layer)
    for layer in layers:
        states = apply(layer, states, states)
    last = states.take_along_dim((lengths - 1)[:, None, None], dim=1)
    return apply(last_layer, last, states).squeeze(1)


def padded_states(
    model: PreferenceAwareTRM, history: Tensor, lengths: Tensor, texts: Tensor, table: Tensor
) -> Tensor:
    """``history_states`` of adapted texts ``[L, B, H]`` and the items' table, padding included."""
    width = history.shape[1]
    padded = F.pad(history, (0, model.config.max_length - width))
    # Real matrices instead of complex transforms: faster, and torch.compile generates no others.
    ids, words = model._spectrum(F.embedding(padded.T, table)), model._spectrum(texts)
    kernel = model.complex_weight.permute(3, 1, 0, 2).flatten(0, 1)
    a, b = (model._sequence(multiply_spectra(ids, other))[:, :width] for other in (kernel, words))
    mixed = 2 * (
        a * torch.sigmoid(model.item_gating(a)) + b * torch.sigmoid(model.fusion_gating(b))
    )
    states = model.LayerNorm(mixed + model.position_embedding.weight[:width])
    return padded_encoder(model.trm_encoder, model.dropout(states), lengths)


def adapted(model: PreferenceAwareTRM, history: Tensor) -> Tensor:
    """Texts of a batch through the adaptor, every distinct item once, ``[L, B, H]``."""
    padded = F.pad(history, (0, model.config.max_length - history.shape[1])).T
    items, where = padded.unique(return_inverse=True)
    return F.embedding(where, model.moe_adaptor(model.item_plm_embedding(items)))


def authors_path(model: PreferenceAwareTRM, k: int) -> Callable[..., Any]:
    """Module by module; item texts through the adaptor and the table normalised at every call."""

    @torch.no_grad()
    def call(history: Tensor, lengths: Tensor, preference: Tensor) -> Any:
        table = model.item_embedding.weight
        states = padded_states(model, history, lengths, adapted(model, history), table)
        users = model.with_preference(states, preference)
        return ranked(users, F.normalize(table, dim=1), history, k)

    return call


def eager_module(model: PreferenceAwareTRM, k: int) -> Callable[..., Any]:
    """The same without padding in the encoder, as the module computes it in training."""

    @torch.no_grad()
    def call(history: Tensor, lengths: Tensor, preference: Tensor) -> Any:
        users = model.with_preference(model.history_states(history, lengths), preference)
        return ranked(users, F.normalize(model.item_embedding.weight, dim=1), history, k)

    return call


class CompiledTRM:
    """The module with adapted texts and normalised items cached, compiled for its batch shape."""

    def __init__(self, model: PreferenceAwareTRM, k: int) -> None:
        self.model, self.k = model, k
        with torch.no_grad():
            chunks = model.item_plm_embedding.weight.split(4096)
            self.texts = torch.cat([model.moe_adaptor(rows) for rows in chunks])
            self.items = F.normalize(model.item_embedding.weight, dim=1)
        self.table = model.item_embedding.weight.detach()
        for table in (self.texts, self.table):  # one compilation for all catalogues
            torch._dynamo.mark_dynamic(table, 0)
        self.vectors = torch.compile(self._vectors, dynamic=False)

    def _vectors(
        self, history: Tensor, lengths: Tensor, preference: Tensor, texts: Tensor, table: Tensor
    ) -> Tensor:
        padded = F.pad(history, (0, self.model.config.max_length - history.shape[1]))
        words = F.embedding(padded.T, texts)
        states = padded_states(self.model, history, lengths, words, table)
        return self.model.with_preference(states, preference)

    @torch.no_grad()
    def __call__(self, history: Tensor, lengths: Tensor, preference: Tensor) -> Any:
        users = self.vectors(history, lengths, preference, self.texts, self.table)
        return ranked(users, self.items, history, self.k)


def recbole_ms(items: int, batch: int, length: int, threads: int) -> dict[str, float]:
    """Median and p99 in ms of SASRec's full_sort_predict + topk, in a process of its own.

    Empty unless the environment variable RECBOLE_PYTHON names a Python that has RecBole.
    """
    python = os.environ.get(RECBOLE_PYTHON)
    if not python:
        return {}
    script = Path(__file__).parent / "recbole_sasrec.py"
    arguments = [str(x) for x in (items, batch, length, threads)]
    done = subprocess.run([python, script, *arguments], capture_output=True, text=True, check=True)
    return {name: float(ms) for name, ms in json.loads(done.stdout.splitlines()[-1]).items()}
