"""The phrases that can describe each item, and the embedding of a preference made of phrases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from deeprec.data import Catalog

SEPARATOR = ";"
LIKE_PREFIX = "like "
# A title word is worth a phrase when it links titles; shorter ones are mostly articles.
MIN_WORD_TITLES = 2
MIN_WORD_LENGTH = 4

Int64Array = NDArray[np.int64]


class TextEncoder(Protocol):
    """What this module needs of a :class:`~deeprec.text.SentenceEncoder`."""

    dim: int

    def encode(
        self, texts: Sequence[str], *, query: bool = False, store: bool | None = None
    ) -> Tensor: ...


class Kind(IntEnum):
    """What a phrase says of an item."""

    CATEGORY = 0  # "Action"
    YEAR = 1  # "2013"
    DECADE = 2  # "2010s"
    WORD = 3  # "Gravity"
    LIKE = 4  # "like Gravity (2013)"; the only kind that every item has


class PhraseBook:
    """Every phrase of a catalogue, and which items each kind of phrase describes.

    ``texts[p]`` is phrase p; ``texts[0]`` is empty and stands for "no phrase".
    """

    texts: tuple[str, ...]

    def __init__(self, catalog: Catalog) -> None:
        ids: dict[str, int] = {"": 0}
        phrases: list[int] = []
        offsets = [0]
        words = _linking_words(catalog)
        for item in range(1, catalog.n_items + 1):
            year, decade = catalog.year(item), catalog.decade(item)
            by_kind: dict[Kind, Sequence[str]] = {
                Kind.CATEGORY: catalog.categories[item - 1],
                Kind.YEAR: () if year is None else (str(year),),
                Kind.DECADE: () if decade is None else (decade,),
                Kind.WORD: words[item - 1],
                Kind.LIKE: (LIKE_PREFIX + catalog.title(item),),
            }
            for kind in Kind:
                # A separator inside a name would cut the phrase in two when it is read back.
                phrases += [ids.setdefault(_one_phrase(text), len(ids)) for text in by_kind[kind]]
                offsets.append(len(phrases))
        self.texts = tuple(ids)
        self._phrases = np.array(phrases, dtype=np.int64)
        self._starts = np.array(offsets[:-1], dtype=np.int64).reshape(-1, len(Kind))
        self._counts = np.diff(np.array(offsets, dtype=np.int64)).reshape(-1, len(Kind))

    def draw(self, items: Int64Array, kinds: Int64Array, rng: np.random.Generator) -> Int64Array:
        """A random phrase of each kind about each item, phrase ids shaped like ``items``.

        An item that has none of the kind gets its "like …" phrase, item 0 gets phrase 0.
        """
        row = np.maximum(items - 1, 0)
        kind = np.where(self._counts[row, kinds] > 0, kinds, Kind.LIKE)
        pick = (rng.random(items.shape) * self._counts[row, kind]).astype(np.int64)
        return np.where(items > 0, self._phrases[self._starts[row, kind] + pick], 0)

    def join(self, phrases: Int64Array) -> list[str]:
        """Preference texts of phrase ids ``[B, K]``: without repeats and zeros, "; " between."""
        return [
            f"{SEPARATOR} ".join(self.texts[p] for p in dict.fromkeys(row) if p)
            for row in phrases.tolist()
        ]


class PhraseEncoder:
    """Embeds a preference as the normalised mean of its phrases' embeddings.

    A preference is a list of short phrases (arXiv 2505.16810, §3.1), and people and policies use
    the same phrases over and over. Encoding phrase by phrase makes almost every preference a
    matter of looking up vectors that are in the encoder's cache, in training as in roll-outs.
    An empty preference is the zero vector: no preference.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self.dim = encoder.dim

    def encode(
        self, texts: Sequence[str], *, query: bool = True, store: bool | None = None
    ) -> Tensor:
        """Vectors f32 [n, P] of n preferences; ``query`` and ``store`` as the encoder has them."""
        split = [split_phrases(text) for text in texts]
        known = {phrase: n for n, phrase in enumerate(dict.fromkeys(p for s in split for p in s))}
        if not known:
            return torch.zeros(len(texts), self.dim)
        vectors = self._encoder.encode(list(known), query=query, store=store)
        flat = torch.tensor([known[phrase] for phrases in split for phrase in phrases])
        offsets = torch.tensor([0] + [len(phrases) for phrases in split[:-1]]).cumsum(0)
        return F.normalize(F.embedding_bag(flat, vectors, offsets, mode="sum"), dim=-1)


def split_phrases(text: str) -> list[str]:
    """The distinct phrases of a preference, in order."""
    stripped = (phrase.strip() for phrase in text.split(SEPARATOR))
    return list(dict.fromkeys(phrase for phrase in stripped if phrase))


def _one_phrase(text: str) -> str:
    return " ".join(text.replace(SEPARATOR, ",").split())


def _linking_words(catalog: Catalog) -> list[list[str]]:
    words = [
        sorted({w for w in re.findall(r"[^\W\d_]+", title) if len(w) >= MIN_WORD_LENGTH})
        for title in catalog.titles
    ]
    titles = Counter(word for of_title in words for word in of_title)
    return [[w for w in of_title if titles[w] >= MIN_WORD_TITLES] for of_title in words]
