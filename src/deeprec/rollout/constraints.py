"""Constrained decoding: which tokens may come next.

A final list may only hold titles that were retrieved in its conversation and not listed yet. The
lines are walked as a trie of token sequences, so titles of one token and of many work alike. A
preference may name a title of the catalogue once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Protocol

from deeprec.rollout.protocol import LIST_CLOSE, LIST_LENGTH, LIST_OPEN
from deeprec.rollout.token_text import TokenText

__all__ = ["Constraint", "ConstraintState", "DistinctTitles", "ListConstraint", "ListLines"]


class ConstraintState(Protocol):
    """Where a constrained text stands."""

    def allowed(self) -> tuple[int, ...] | None:
        """Ids the next token may have; None: anything, the constraint has ended."""
        ...

    def advance(self, token: int) -> None:
        """Take note of the next token, one of :meth:`allowed`."""
        ...


class Constraint(Protocol):
    """Restricts what follows the string ``trigger`` wherever it stands in a turn."""

    trigger: str

    def open(self, overrun: str) -> ConstraintState:
        """The state after the trigger; ``overrun`` is what its last token wrote beyond it."""
        ...


class DistinctTitles:
    """After "like ", one of the titles that this turn has not named yet.

    Its own state, as a turn is at one title at a time. For tokenizers that have one token a title.

    Args:
        trigger: what stands before a title.
        titles: the token of each title that may be named, ascending.
    """

    def __init__(self, trigger: str, titles: tuple[int, ...]) -> None:
        self.trigger = trigger
        self._left = titles
        self._asked = False

    def open(self, overrun: str) -> DistinctTitles:
        """See :class:`Constraint`. Words that only contain the trigger restrict nothing."""
        self._asked = not overrun
        return self

    def allowed(self) -> tuple[int, ...] | None:
        """See :class:`ConstraintState`. Nothing is asked for once every title was named."""
        return self._left or None if self._asked else None

    def advance(self, token: int) -> None:
        """See :class:`ConstraintState`."""
        at = bisect_left(self._left, token)
        self._left = self._left[:at] + self._left[at + 1 :]
        self._asked = False


class ListLines:
    """Token sequences of the lines of a final list, encoded once per title.

    Args:
        text: of the policy's tokenizer.
        titles: ``titles[i]`` is the title of item ``i + 1``.
        n_lines: lines of a complete list.
    """

    def __init__(self, text: TokenText, titles: Sequence[str], n_lines: int = LIST_LENGTH) -> None:
        self.n_lines = n_lines
        self._text = text
        self._titles = titles
        self._cache: dict[str, tuple[int, ...]] = {}
        # The space after the number belongs to the number or to the title, as the tokenizer
        # itself would have it: other splits are text it has never seen.
        probe = f"\n1. {titles[0]}"
        self._gap = (
            " " if self.encode("\n1. ") + self.encode(titles[0]) != self.encode(probe) else ""
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a piece of text."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._cache[text] = tuple(self._text.encode([text])[0])
        return ids

    def number(self, line: int) -> str:
        """The text before the title of a line (1-based), its line break included."""
        return f"\n{line}." if self._gap else f"\n{line}. "

    def title(self, item: int) -> tuple[int, ...]:
        """Ids of an item's title as it stands on a line."""
        return self.encode(self._gap + self._titles[item - 1])

    def over(self, items: Iterable[int]) -> ListConstraint:
        """The constraint to lists of ``items``."""
        return ListConstraint(self, tuple(dict.fromkeys(items)))


class ListConstraint:
    """A final list of the given items, each at most once."""

    trigger = LIST_OPEN

    def __init__(self, lines: ListLines, items: tuple[int, ...]) -> None:
        self.lines = lines
        self.items = items

    def open(self, overrun: str) -> ListState:
        """See :class:`Constraint`."""
        return ListState(self.lines, self.items, overrun)


class _Node:
    """A trie node: titles that start with the tokens leading here."""

    __slots__ = ("children", "ends_title")

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.ends_title = False


class ListState:
    """Inside a final list: in the fixed text between titles, or on the way through a title."""

    def __init__(self, lines: ListLines, items: tuple[int, ...], overrun: str) -> None:
        self._lines = lines
        self._root = _Node()
        self._left = 0
        for item in items:
            self._insert(item)
        self._line = 0
        self._node: _Node | None = None  # None: in fixed text
        self._path: list[tuple[_Node, int]] = []
        self._ended = False
        self._fixed: tuple[int, ...] = ()
        self._at = 0
        self._begin_fixed(overrun)

    def allowed(self) -> tuple[int, ...] | None:
        """See :class:`ConstraintState`."""
        if self._ended:
            return None
        if self._node is None:
            return (self._fixed[self._at],)
        ids = list(self._node.children)
        if self._node.ends_title:
            ids.append(self._after_title()[0])
        return tuple(sorted(ids))

    def advance(self, token: int) -> None:
        """See :class:`ConstraintState`."""
        node = self._node
        if node is not None and token in node.children:
            self._path.append((node, token))
            self._node = node.children[token]
            return
        if node is not None:  # the title is complete, this is the first token after it
            self._fixed, self._at = self._after_title(), 0
            self._remove(node)
            self._node = None
            self._line += 1
        self._at += 1
        if self._at == len(self._fixed):
            self._begin_title()

    def _insert(self, item: int) -> None:
        node = self._root
        for token in self._lines.title(item):
            node = node.children.setdefault(token, _Node())
        if not node.ends_title:  # two titles of the same tokens count as one
            node.ends_title = True
            self._left += 1

    def _remove(self, node: _Node) -> None:
        """Take the title just completed out of the trie."""
        node.ends_title = False
        self._left -= 1
        for parent, token in reversed(self._path):
            child = parent.children[token]
            if child.ends_title or child.children:
                break
            del parent.children[token]
        self._path = []

    def _after_title(self) -> tuple[int, ...]:
        """The fixed text after the title under way: the next number, or the end of the list."""
        last = self._line + 1 >= self._lines.n_lines or self._left <= 1
        return self._lines.encode(f"\n{LIST_CLOSE}" if last else self._lines.number(self._line + 2))

    def _begin_fixed(self, overrun: str) -> None:
        """Set out for the first number, or for the end where there is nothing to list."""
        text = self._lines.number(1) if self._left else f"\n{LIST_CLOSE}"
        if text.startswith(overrun):
            text = text[len(overrun) :]
        self._fixed = self._lines.encode(text) if text else ()
        if not self._fixed:
            self._begin_title()

    def _begin_title(self) -> None:
        if self._line >= self._lines.n_lines or not self._left:
            self._ended = True
            self._node = None
        else:
            self._node = self._root
