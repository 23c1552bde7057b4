"""RecBole atomic files: NAME.inter and NAME.item, tab-separated, headers like "title:token_seq".

Zhao et al., "RecBole: Towards a Unified, Comprehensive and Efficient Framework for Recommendation
Algorithms", CIKM 2021.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from deeprec.data.formats.movielens import title_with_article_first
from deeprec.data.tables import DataError, RawTables, check_columns, read_csv

__all__ = ["detect", "read"]

# What the published atomic files call the title and the categories.
_TITLES = ("title", "movie_title", "movie_name", "item_name", "app_name", "name")
_CATEGORIES = ("categories", "category", "class", "genre", "genres", "type")
_QUOTED = re.compile(r"""'([^']+)'|"([^"]+)\"""")


def detect(folder: Path) -> bool:
    """Whether the folder holds a .inter file."""
    return any(folder.glob("*.inter"))


def read(folder: Path, columns: Mapping[str, str]) -> RawTables:
    """Read the one .inter file of the folder and its .item file.

    ``columns`` names the fields that hold user_id, item_id, rating, timestamp, title and
    categories where they differ from the usual ones. A release_year field goes behind the title.
    """
    interactions = _read_atomic(_only(folder, ".inter"), columns)
    path = _only(folder, ".item")
    items = _read_atomic(path, columns)
    check_columns(interactions, ["user_id", "item_id", "timestamp"], _only(folder, ".inter"))
    check_columns(items, ["item_id", "title", "categories"], path)
    titles = [title_with_article_first(title) for title in items["title"].fillna("")]
    if "release_year" in items.columns:
        years = items["release_year"].fillna("")
        titles = [_with_year(title, year) for title, year in zip(titles, years, strict=True)]
    categories = [_categories(value) for value in items["categories"].fillna("")]
    return RawTables(
        interactions,
        pd.DataFrame({"item_id": items["item_id"], "title": titles, "categories": categories}),
    )


def _only(folder: Path, suffix: str) -> Path:
    found = sorted(folder.glob(f"*{suffix}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{folder}: expected one {suffix} file, found {names}")
    return found[0]


def _read_atomic(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    table = read_csv(path, sep="\t", quoting=3)  # a quote is an ordinary character there
    table.columns = pd.Index([str(header).split(":")[0] for header in table.columns])
    names = dict(columns)
    for wanted, usual in (("title", _TITLES), ("categories", _CATEGORIES)):
        found = [name for name in usual if name in table.columns]
        if wanted not in names and found:
            names[wanted] = found[0]
    return table.rename(columns={names[to]: to for to in names})


def _with_year(title: str, year: str) -> str:
    return f"{title} ({year})" if title and year and not title.endswith(f"({year})") else title


def _categories(value: str) -> tuple[str, ...]:
    """A token_seq is split at blanks; the Amazon files quote each category instead."""
    quoted = [single or double for single, double in _QUOTED.findall(value)]
    return tuple(quoted or value.split())
