"""The turn protocol: delimiters, and reading preferences and final lists out of text.

The delimiters are DeepRec's (Zheng et al., arXiv 2505.16810), verbatim: checkpoints trained on
them and servers that look for them depend on every character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
PREFERENCE_OPEN = "<|begin_of_preference|>"
PREFERENCE_CLOSE = "<|end_of_preference|>"
ITEMS_OPEN = "<|begin_of_item_list|>"
ITEMS_CLOSE = "<|end_of_item_list|>"
LIST_OPEN = "<recommendation_list>"
LIST_CLOSE = "</recommendation_list>"
DELIMITERS = (
    THINK_OPEN,
    THINK_CLOSE,
    PREFERENCE_OPEN,
    PREFERENCE_CLOSE,
    ITEMS_OPEN,
    ITEMS_CLOSE,
    LIST_OPEN,
    LIST_CLOSE,
)
LIST_LENGTH = 10  # lines of the final list, k of the paper
PROMPT_END = f"Assistant:\n{THINK_OPEN}\n"  # every prompt ends so: the policy continues inside it

_LINE_NUMBER = re.compile(r"^\s*\d+\.\s*")


class ListedLine(NamedTuple):
    """One line of a final list: its title, and where the title starts in the text searched."""

    title: str
    start: int


def clean_preference(text: str) -> str:
    """What the encoder sees of a preference: no double quotes, white space collapsed."""
    return " ".join(text.replace('"', "").split())


def read_preference(turn_text: str) -> str | None:
    """The preference a turn ends with, stripped but otherwise as written.

    ``turn_text`` is what the policy wrote since the last observation. None when the closing
    delimiter has no opening one before it: nothing says what the preference is.
    """
    before, closed, _ = turn_text.partition(PREFERENCE_CLOSE)
    _, opened, preference = before.rpartition(PREFERENCE_OPEN)
    return preference.strip() if opened and closed else None


def read_final_list(response: str) -> list[ListedLine] | None:
    """The lines of the last closed recommendation list, without their numbers; None without one.

    Empty lines are not lines; a line without a number keeps its whole text.
    """
    end = response.rfind(LIST_CLOSE)
    start = response.rfind(LIST_OPEN, 0, end) if end >= 0 else -1
    if start < 0:
        return None
    lines = []
    position = start + len(LIST_OPEN)
    for line in response[position:end].split("\n"):
        number = _LINE_NUMBER.match(line)
        skipped = number.end() if number else len(line) - len(line.lstrip())
        title = line[skipped:].rstrip()
        if title:
            lines.append(ListedLine(title, position + skipped))
        position += len(line) + 1
    return lines


def observation_text(lines: Iterable[str]) -> str:
    """What the tool appends after a preference: the numbered lines between their delimiters."""
    return f"\n\n{ITEMS_OPEN}{numbered(list(lines))}{ITEMS_CLOSE}\n\n"


def final_list_text(titles: Sequence[str]) -> str:
    """A complete recommendation list of ``titles``."""
    return f"{LIST_OPEN}{numbered(titles)}{LIST_CLOSE}"


def numbered(lines: Sequence[str]) -> str:
    """``lines`` as a numbered list, a line break before, between and after them."""
    return "".join(f"\n{number}. {line}" for number, line in enumerate(lines, 1)) + "\n"
