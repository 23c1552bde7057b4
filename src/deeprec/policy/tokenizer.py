"""A tokenizer built from a catalogue: one token a title, one a protocol word.

A small policy trained from scratch cannot learn to spell titles in minutes, so every title is a
token of its own, and so are the delimiters, list numbers, categories, years, decades and weeks.
Any other text falls back to bytes, so that decoding always gives back exactly what was encoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from deeprec.data import Catalog
from deeprec.rollout import protocol
from deeprec.trm.phrases import LIKE_PREFIX

__all__ = ["END", "PAD", "PHRASES", "build_title_tokenizer", "number_token", "week_token"]

PAD = "<|pad|>"
END = "<|end|>"
PHRASE_SEPARATOR = "; "
# The prompt's and the reasoning's fixed phrases, one token each.
HISTORY_HEADER = "History:"
REQUEST_END = "?\nAssistant:\n" + protocol.THINK_OPEN + "\n"
LIKE = LIKE_PREFIX  # as the recommender reads it
ASK = "The user may want "
RANK = "Ranking what was found."
PHRASES = (HISTORY_HEADER, REQUEST_END, LIKE, ASK, RANK, PHRASE_SEPARATOR, "\n", "\n\n", " ")
LONGEST_LIST = 50  # numbers 1..50 are one token each: as many lines as a tool call may return


def week_token(timestamp: int) -> str:
    """The ISO week of a moment (unix seconds) as it stands before a history line."""
    year, week, _ = datetime.fromtimestamp(timestamp, tz=timezone.utc).isocalendar()
    return f"\n{year}-W{week:02d}: "


def number_token(number: int) -> str:
    """What stands before the title of line ``number`` of a list, its line break included."""
    return f"\n{number}. "


def _weeks(first: int, last: int) -> list[str]:
    """Week tokens of every week from ``first`` to ``last`` (unix seconds)."""
    seven_days = 7 * 24 * 3600
    return list(dict.fromkeys(week_token(t) for t in (*range(first, last, seven_days), last)))


def build_title_tokenizer(catalog: Catalog, first: int, last: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a catalogue whose interactions lie between two moments (unix seconds).

    Decoding an encoding returns the text unchanged, whatever the text. Titles are matched
    leftmost-longest, so a title that is a prefix of another never hides it.
    """
    items = range(1, catalog.n_items + 1)
    years = {year for year in map(catalog.year, items) if year is not None}
    decades = {decade for decade in map(catalog.decade, items) if decade is not None}
    words: Iterable[str] = (
        *protocol.DELIMITERS,
        *PHRASES,
        *(number_token(n) for n in range(1, LONGEST_LIST + 1)),
        *_weeks(first, last),
        *sorted({c for categories in catalog.categories for c in categories}),
        *(str(year) for year in sorted(years)),
        *sorted(decades),
        *catalog.titles,
    )
    vocabulary = {PAD: 0, END: 1}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token=PAD))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([PAD, END])
    tokenizer.add_tokens(
        [AddedToken(word, normalized=False, special=False) for word in dict.fromkeys(words)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )
