"""The prompt of the title-token policy: dated history, request date, nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from deeprec.data import Catalog, Requests
from deeprec.policy.tokenizer import HISTORY_HEADER, REQUEST_END, week_token

__all__ = ["TitlePrompt", "TitleTokens"]


class TitleTokens:
    """Token ids of titles and weeks, and back.

    ``titles`` int64 [n_items + 1]: the token of every item, row 0 is the padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, catalog: Catalog) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary[title] for title in catalog.titles]
        self.titles = np.array([tokenizer.pad_token_id, *ids], dtype=np.int64)
        self._weeks: dict[str, int] = {}

    def week(self, timestamp: int) -> int:
        """Token of the week of a moment (unix seconds).

        Raises ValueError for a week outside the tokenizer's range.
        """
        text = week_token(timestamp)
        if text not in self._weeks:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"the tokenizer has no token for the week {text.strip()!r}: requests must lie "
                    "within the dates of the data set it was built from"
                )
            self._weeks[text] = ids[0]
        return self._weeks[text]

    def dated(
        self, items: npt.NDArray[np.int64], timestamps: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """``[week, title, week, title, …]`` int64 [2n] of n items and their dates."""
        tokens = np.empty(2 * len(items), dtype=np.int64)
        tokens[0::2] = [self.week(int(t)) for t in timestamps]
        tokens[1::2] = self.titles[items]
        return tokens


class TitlePrompt:
    """Builds prompts: ``History:``, one dated line an item, the request's date, ``Assistant:``."""

    def __init__(self, tokens: TitleTokens) -> None:
        self.tokens = tokens
        encode = tokens.tokenizer.encode
        self.start = encode(HISTORY_HEADER, add_special_tokens=False)
        self._end = encode(REQUEST_END, add_special_tokens=False)

    def build(self, requests: Requests, row: int) -> list[int]:
        """Token ids of the prompt of one request."""
        n = int(requests.lengths[row])
        history = self.tokens.dated(requests.history[row, :n], requests.history_timestamps[row, :n])
        date = self.tokens.week(int(requests.timestamps[row]))
        return [*self.start, *history.tolist(), date, *self._end]
