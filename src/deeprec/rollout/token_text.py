"""Between tokens and their text, for any tokenizer: pieces, offsets, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

__all__ = ["StopTable", "TokenText"]

_BROKEN = "\ufffd"  # what half a character decodes to


class TokenText:
    """Decodes fast where a tokenizer's text is the sum of its tokens' texts.

    ``vocabulary`` is the number of ids the model knows, often rounded up beyond the tokenizer's:
    the rest have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int = 0) -> None:
        self.tokenizer = tokenizer
        size = max(vocabulary, len(tokenizer))
        self.pieces: list[str] = [self._decode([token]) for token in range(size)]
        # Some decoders put or drop spaces between tokens: try pairs from all over the vocabulary.
        ids = np.random.default_rng(0).integers(0, size, (64, 2)).tolist()
        whole = [(a, b) for a, b in ids if not self._is_broken(self.pieces[a] + self.pieces[b])]
        self._is_sum = all(
            self._decode([a, b]) == self.pieces[a] + self.pieces[b] for a, b in whole
        )

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    @staticmethod
    def _is_broken(text: str) -> bool:
        return _BROKEN in text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        if self._is_sum:
            text = "".join([self.pieces[token] for token in ids])
            if not self._is_broken(text):
                return text
        return self._decode(ids)

    def token_at(self, ids: Sequence[int], characters: Sequence[int]) -> list[int]:
        """For each character of the text of ``ids``, the index of the token it begins in."""
        text = self.decode(ids)
        ends = np.cumsum([len(self.pieces[token]) for token in ids])
        if not self._is_sum or len(ids) == 0 or ends[-1] != len(text):
            # Half a character decodes to something too, possibly to more than the whole one.
            ends = np.array([len(self._decode(ids[: n + 1])) for n in range(len(ids))])
            ends = np.minimum.accumulate(ends[::-1])[::-1]
        return [int(i) for i in np.searchsorted(ends, characters, side="right")]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, no special tokens added."""
        if not texts:
            return []
        return [
            list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids
        ]


class StopTable:
    """Finds the token that completes one of some strings.

    A table over the vocabulary rules most tokens out; only those that hold the last character of a
    string have their text looked at.
    """

    def __init__(self, stops: Sequence[str], text: TokenText) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty; leave it out")
        self.stops = tuple(stops)
        self._text = text
        # A token holds at least one byte unless it decodes to nothing, hence the margin.
        self._tail = max((len(stop.encode()) for stop in stops), default=0) + 8
        endings = {stop[-1] for stop in stops} | {_BROKEN}
        self.suspects: NDArray[np.bool_] = np.array(
            [not endings.isdisjoint(piece) for piece in text.pieces]
        )

    def completed(self, ids: Sequence[int]) -> tuple[str, str] | None:
        """The stop string that the last of ``ids`` completes and the text after it, or None."""
        tail = self._text.decode(ids[-self._tail :])
        before = len(self._text.decode(ids[-self._tail : -1])) if len(ids) > 1 else 0
        for stop in self.stops:
            found = tail.find(stop, max(0, before - len(stop) + 1))
            if found >= 0:
                return stop, tail[found + len(stop) :]
        return None
