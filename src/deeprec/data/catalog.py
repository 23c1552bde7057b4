"""The item catalogue: titles and categories of items 1..n."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Catalog"]

_YEAR = re.compile(r"\((\d{4})\)$")


@dataclass(frozen=True)
class Catalog:
    """Titles, categories and original ids of the items.

    Items are numbered from 1 to ``n_items``; 0 is padding and "unknown". ``titles[i]``,
    ``categories[i]`` and ``keys[i]`` belong to item ``i + 1``. Titles are unique, also when
    stripped and lower-cased, so a title that a language model wrote names at most one item.

    Raises ValueError when the three differ in length or a title is empty or occurs twice.
    """

    titles: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.titles) == len(self.categories) == len(self.keys):
            raise ValueError(
                "titles, categories and keys must have one entry an item, got "
                f"{len(self.titles)}, {len(self.categories)} and {len(self.keys)}"
            )
        if len(self._by_loose_title) != len(self.titles) or "" in self._by_loose_title:
            raise ValueError(
                "titles must be unique (ignoring case) and not empty; load_dataset makes them so"
            )

    @property
    def n_items(self) -> int:
        """Number of items; ids run from 1 to this number."""
        return len(self.titles)

    def title(self, item: int) -> str:
        """Title of an item id in 1..n_items; IndexError for any other id."""
        return self.titles[self._row(item)]

    def year(self, item: int) -> int | None:
        """The year in brackets at the end of the title, if there is one."""
        match = _YEAR.search(self.title(item))
        return int(match[1]) if match else None

    def decade(self, item: int) -> str | None:
        """The decade of :meth:`year` in words, such as ``2010s``."""
        year = self.year(item)
        return None if year is None else f"{year // 10 * 10}s"

    def text(self, item: int) -> str:
        """The item as the language model reads it: the title, then a line with its categories."""
        row = self._row(item)
        if not self.categories[row]:
            return self.titles[row]
        return f"{self.titles[row]}\n  - categories: {', '.join(self.categories[row])}"

    def encoder_texts(self) -> list[str]:
        """What a sentence encoder reads of items 1..n_items: title, then categories."""
        return [
            f"{title}. {', '.join(categories)}" if categories else title
            for title, categories in zip(self.titles, self.categories, strict=True)
        ]

    def find(self, title: str) -> int:
        """Item id of exactly this title, 0 when there is none."""
        return self._by_title.get(title, 0)

    def find_loose(self, title: str) -> int:
        """Item id of this title when both are stripped and lower-cased, 0 when there is none."""
        return self._by_loose_title.get(_loose(title), 0)

    def _row(self, item: int) -> int:
        if not 1 <= item <= len(self.titles):
            raise IndexError(f"item must be in 1..{len(self.titles)}, got {item}")
        return item - 1

    @cached_property
    def _by_title(self) -> dict[str, int]:
        return _numbered(self.titles)

    @cached_property
    def _by_loose_title(self) -> dict[str, int]:
        return _numbered([_loose(title) for title in self.titles])


def _loose(title: str) -> str:
    return title.strip().lower()


def _numbered(titles: Sequence[str]) -> dict[str, int]:
    return {title: item for item, title in enumerate(titles, start=1)}
