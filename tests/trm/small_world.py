"""What tests know of the small world: its genres, and an encoder that reads words."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

GENRES = ("Action", "Comedy", "Drama", "Horror")


class WordEncoder:
    """A text is the normalised sum of its words' fixed random vectors."""

    dim = 24

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(
        self, texts: Sequence[str], *, query: bool = False, store: bool | None = None
    ) -> Tensor:
        self.encoded += texts
        return F.normalize(torch.stack([self._vector(text) for text in texts]), dim=-1)

    def _vector(self, text: str) -> Tensor:
        words = text.replace(",", " ").replace(".", " ").split()
        seeds = [zlib.crc32(word.encode()) for word in words]
        return torch.stack(
            [torch.randn(self.dim, generator=torch.Generator().manual_seed(s)) for s in seeds]
        ).sum(0)
