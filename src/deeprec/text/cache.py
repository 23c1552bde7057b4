"""Vectors of texts that were encoded before: some in memory, documents also on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

__all__ = ["DiskCache", "MemoryCache"]

logger = logging.getLogger(__name__)

_KEY_BYTES = 16  # 128 bits: no two texts meet by chance


class MemoryCache:
    """The ``capacity`` most recently used vectors, in one table so that a batch is one gather."""

    def __init__(self, dim: int, capacity: int) -> None:
        self._table = torch.empty(capacity, dim)
        self._rows: OrderedDict[str, int] = OrderedDict()

    def rows(self, texts: Sequence[str]) -> list[int]:
        """Table row of every text, -1 where it is not cached; found ones count as used."""
        known = self._rows
        found = [known.get(text, -1) for text in texts]
        for text, row in zip(texts, found, strict=True):
            if row >= 0:
                known.move_to_end(text)
        return found

    def gather(self, rows: Sequence[int]) -> Tensor:
        """Copy of the vectors f32 [n, dim] in these rows."""
        return self._table[torch.tensor(rows, dtype=torch.int64)]

    def add(self, texts: Sequence[str], vectors: Tensor) -> None:
        """Store vectors [n, dim] of texts that are not cached yet; the oldest make room."""
        capacity = len(self._table)
        texts, vectors = texts[-capacity:], vectors[-capacity:]
        rows = []
        for text in texts:
            if len(self._rows) < capacity:
                row = len(self._rows)
            else:
                _, row = self._rows.popitem(last=False)
            self._rows[text] = row
            rows.append(row)
        self._table[torch.tensor(rows, dtype=torch.int64)] = vectors


class DiskCache:
    """Vectors in a folder, one file per batch of new texts.

    A file is written under a temporary name and renamed, and its name is a digest of its texts:
    processes that write at the same time, or are killed, leave whole files or none. A file whose
    checksum is wrong is reported and deleted, so that its texts are encoded again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[bytes, np.ndarray] | None = None

    def get(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """Vector f32 [dim] of each text, None where there is none."""
        if self._known is None:
            self._known = {}
            for file in sorted(self._folder.glob("*.safetensors")):
                self._known.update(_read(file))
        return [self._known.get(_key(text)) for text in texts]

    def add(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Write the vectors f32 [n, dim] of n texts; failure to is a warning."""
        keys = [_key(text) for text in texts]
        if self._known is not None:
            self._known.update(zip(keys, vectors, strict=True))
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:32]
        try:
            _write(self._folder / f"{name}.safetensors", keys, vectors)
        except OSError as error:
            # Vectors are only a saving of time: a full disk must not end the run.
            logger.warning("text vectors could not be cached in %s: %s", self._folder, error)


def _key(text: str) -> bytes:
    # A lone surrogate, as broken data files contain, is text too.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:_KEY_BYTES]


def _checksum(keys: np.ndarray, vectors: np.ndarray) -> str:
    digest = hashlib.sha256(keys.tobytes())
    digest.update(vectors.tobytes())
    return digest.hexdigest()


def _write(file: Path, keys: list[bytes], vectors: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _KEY_BYTES)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    os.close(handle)
    try:
        save_file(
            {"keys": table, "vectors": vectors},
            temporary,
            metadata={"sha256": _checksum(table, vectors)},
        )
        os.replace(temporary, file)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _read(file: Path) -> dict[bytes, np.ndarray]:
    try:
        with safe_open(file, framework="numpy") as stored:
            keys, vectors = stored.get_tensor("keys"), stored.get_tensor("vectors")
            expected = (stored.metadata() or {}).get("sha256")
    except FileNotFoundError:  # deleted by another process a moment ago
        return {}
    except (SafetensorError, OSError) as error:
        return _discard(file, str(error))
    if _checksum(keys, vectors) != expected:
        return _discard(file, "its checksum is wrong")
    return {key.tobytes(): vector for key, vector in zip(keys, vectors, strict=True)}


def _discard(file: Path, reason: str) -> dict[bytes, np.ndarray]:
    logger.warning("cached text vectors in %s are damaged (%s): encoding them again", file, reason)
    file.unlink(missing_ok=True)
    return {}
