"""The format rules: which of them a response or a trajectory breaks, by name.

:func:`broken_in_text` are the rules of the authors' code, which reads everything back from the
decoded response. :func:`broken_in_trajectory` asks the trajectory for what it knows (answered
calls, the list, how it ended) and looks at the text only for what the policy itself may have
written wrongly; text that the tool wrote never counts against the policy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deeprec.rollout.protocol import (
    ITEMS_CLOSE,
    ITEMS_OPEN,
    LIST_CLOSE,
    LIST_LENGTH,
    LIST_OPEN,
    PREFERENCE_CLOSE,
    PREFERENCE_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
)

if TYPE_CHECKING:
    from deeprec.rollout import Trajectory

__all__ = [
    "broken_in_text",
    "broken_in_trajectory",
    "has_valid_list",
    "list_lines",
    "names_twice",
    "written_preferences",
]

ROLE_WORDS = ("Assistant", "assistant")
# Phrases of the published prompt that a policy may copy instead of filling in.
PLACEHOLDERS = (
    "[user preference phrases, concatenated by ;]",
    "[Continue iterating through the process—reasoning before tool invocation,",
    "[recalled item",
    "[purchased item",
    " to recommend]\n",
)
TOOL_WORDS = tuple(
    delimiter.strip("<|>")
    for delimiter in (PREFERENCE_OPEN, PREFERENCE_CLOSE, ITEMS_OPEN, ITEMS_CLOSE)
)
CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")  # the unified ideographs' main blocks
ITEM_LIST = re.compile(f"{re.escape(ITEMS_OPEN)}.*?{re.escape(ITEMS_CLOSE)}", re.DOTALL)
FINAL_LIST = re.compile(f"{re.escape(LIST_OPEN)}.*?{re.escape(LIST_CLOSE)}", re.DOTALL)


def written_preferences(response: str) -> list[str]:
    """The stripped preferences of a response; one never closed runs to the next one's start."""
    pieces = response.split(PREFERENCE_OPEN)[1:]
    return [piece.split(PREFERENCE_CLOSE)[0].strip() for piece in pieces]


def list_lines(response: str) -> list[str]:
    """The lines of the first closed recommendation list of a response, none when it has none."""
    found = FINAL_LIST.search(response)
    if found is None:
        return []
    return found.group()[len(LIST_OPEN) : -len(LIST_CLOSE)].strip().split("\n")


def broken_in_text(response: str, list_size: int) -> tuple[str, ...]:
    """Names of the format rules that a decoded response breaks, none when it is well formed."""
    return tuple(_text_rules(response, list_size))


def broken_in_trajectory(
    trajectory: Trajectory, list_size: int, distinct: bool = True
) -> tuple[str, ...]:
    """Names of the format rules that a trajectory breaks, none when it is well formed.

    A trajectory that did not end with its list breaks the rule named as its ``finish``.
    """
    broken = [] if trajectory.finish == "done" else [trajectory.finish]
    if not trajectory.turns:
        broken.append("no_tool_call")
    if trajectory.finish == "done":
        broken.extend(_list_rules(trajectory.ranked, list_size, distinct))
    broken.extend(_own_text_rules(trajectory.text, len(trajectory.turns)))
    return tuple(broken)


def has_valid_list(trajectory: Trajectory, list_size: int = LIST_LENGTH) -> bool:
    """Whether a trajectory ended with a list of ``list_size`` items, none of them twice."""
    return trajectory.finish == "done" and not any(_list_rules(trajectory.ranked, list_size, True))


def names_twice(items: Sequence[int]) -> bool:
    """Whether a list holds an item more than once; 0, an unknown title, does not count."""
    known = [item for item in items if item > 0]
    return len(set(known)) < len(known)


def _list_rules(ranked: Sequence[int], list_size: int, distinct: bool) -> Iterator[str]:
    if len(ranked) != list_size:
        yield "list_length"
    if distinct and names_twice(ranked):
        yield "item_twice"


def _own_text_rules(text: str, n_calls: int) -> Iterator[str]:
    """The rules on what the policy wrote itself; ``n_calls`` item lists are the tool's."""
    counts = {text.count(PREFERENCE_OPEN), text.count(PREFERENCE_CLOSE)}
    if counts != {n_calls}:
        yield "unanswered_preference"
    if text.count(ITEMS_OPEN) != n_calls or text.count(ITEMS_CLOSE) != n_calls:
        yield "forged_item_list"
    reasoning = FINAL_LIST.sub("", ITEM_LIST.sub("", text))
    if any(word in reasoning for word in ROLE_WORDS):
        yield "role_word"
    if CJK.search(reasoning):
        yield "cjk"
    if any(phrase in ITEM_LIST.sub("", text) for phrase in PLACEHOLDERS):
        yield "placeholder"
    yield from _think_and_list_rules(text)


def _text_rules(response: str, list_size: int) -> Iterator[str]:
    delimiters = (PREFERENCE_OPEN, PREFERENCE_CLOSE, ITEMS_OPEN, ITEMS_CLOSE)
    if len({response.count(delimiter) for delimiter in delimiters}) > 1:
        yield "unbalanced_delimiters"
    if response.count(ITEMS_OPEN + "\n1.") != response.count(ITEMS_OPEN) or response.count(
        ITEMS_CLOSE + "\n"
    ) != response.count(ITEMS_CLOSE):
        yield "item_list_shape"
    if PREFERENCE_OPEN not in response:
        yield "no_tool_call"
    if any(word in response for word in ROLE_WORDS):
        yield "role_word"
    if any(phrase in response for phrase in PLACEHOLDERS):
        yield "placeholder"
    yield from _think_and_list_rules(response)
    lines = list_lines(response)
    if any(word in line for line in lines for word in TOOL_WORDS):
        yield "tool_word_in_list"
    if len(lines) != list_size:
        yield "list_length"
    if CJK.search(ITEM_LIST.sub("", response)):
        yield "cjk"


def _think_and_list_rules(text: str) -> Iterator[str]:
    """One end of the reasoning, said after the last item list, and one list after it."""
    if THINK_OPEN in text:
        yield "reasoning_reopened"
    if text.count(THINK_CLOSE) != 1:
        yield "reasoning_end_count"
    if text.count(LIST_OPEN) != 1 or text.count(LIST_CLOSE) != 1:
        yield "list_count"
    if 0 <= text.find(LIST_OPEN) < text.find(THINK_CLOSE):
        yield "list_in_reasoning"
    last_items = text.rfind(ITEMS_CLOSE)
    end = text.find(THINK_CLOSE, last_items + 1)
    if last_items >= 0 and end >= 0 and not text[last_items + len(ITEMS_CLOSE) : end].strip():
        yield "no_closing_reasoning"
