"""The two tables that every file format is read into, and errors of their columns."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["COLUMNS", "DataError", "RawTables", "check_columns", "read_csv"]


# What the loader calls the columns of both tables.
COLUMNS = ("user_id", "item_id", "rating", "timestamp", "title", "categories")


class DataError(ValueError):
    """The files of a data set are not what the loader needs."""


@dataclass
class RawTables:
    """A data set as read from files, before anything is filtered.

    interactions: user_id and item_id (str), timestamp (number, unix seconds or milliseconds) and,
        where the files have one, rating (float).
    items: item_id and title (str), categories (tuple of str).
    notes: remarks for the load report.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    notes: list[str] = field(default_factory=list)


def check_columns(frame: pd.DataFrame, needed: Iterable[str], path: Path) -> None:
    """Raise DataError when a column is missing."""
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise DataError(
            f"{path}: missing column(s) {', '.join(missing)}; found "
            f"{', '.join(map(str, frame.columns))}. Name the columns of your files with "
            f"DataConfig.columns, for example columns={{{missing[0]!r}: 'name in the file'}}"
        )


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """pandas.read_csv with every column as text and pandas' errors turned into DataError.

    Only an empty field counts as missing: "NA", "None" and "null" are titles of real items.
    """
    defaults: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]}
    try:
        table = pd.read_csv(path, **(defaults | options))
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error
    if not isinstance(table.index, pd.RangeIndex):  # what pandas makes of surplus first fields
        raise DataError(f"{path}: the first row has more fields than the header")
    return table
