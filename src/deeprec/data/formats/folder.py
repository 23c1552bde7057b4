"""The plain folder: interactions and items as CSV or Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from deeprec.data.tables import DataError, RawTables, check_columns, read_csv

__all__ = ["detect", "read"]

_SUFFIXES = (".csv", ".csv.gz", ".parquet")
_INTERACTIONS = ("user_id", "item_id", "timestamp")
_ITEMS = ("item_id", "title", "categories")


def detect(folder: Path) -> bool:
    """Whether the folder holds interactions.* and items.*."""
    return _find(folder, "interactions") is not None and _find(folder, "items") is not None


def read(folder: Path, columns: Mapping[str, str]) -> RawTables:
    """Read interactions.* (user_id, item_id, timestamp and perhaps rating) and items.*.

    items.* has item_id, title and categories (joined by "|" in CSV, a list or the same in
    Parquet). ``columns`` maps these names to those of the files.
    """
    return RawTables(
        interactions=_read_table(folder, "interactions", (*_INTERACTIONS, "rating"), columns),
        items=_read_items(folder, columns),
    )


def _read_items(folder: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    items = _read_table(folder, "items", _ITEMS, columns)
    return items.assign(categories=[_categories(value) for value in items["categories"]])


def _categories(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split("|") if part.strip())
    try:
        return tuple(str(part) for part in value)  # type: ignore[attr-defined]
    except TypeError:  # None or NaN
        return ()


def _find(folder: Path, name: str) -> Path | None:
    for suffix in _SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    return None


def _read_table(
    folder: Path, name: str, wanted: tuple[str, ...], columns: Mapping[str, str]
) -> pd.DataFrame:
    path = _find(folder, name)
    if path is None:
        choices = " or ".join(f"{name}{suffix}" for suffix in _SUFFIXES)
        raise DataError(f"{folder}: no {choices}")
    table = _read_parquet(path) if path.suffix == ".parquet" else read_csv(path)
    table = table.rename(columns={columns[to]: to for to in wanted if to in columns})
    check_columns(table, [column for column in wanted if column != "rating"], path)
    table = table[[column for column in wanted if column in table.columns]]
    ids = [column for column in ("user_id", "item_id") if column in table.columns]
    return table.assign(**{column: _as_text(table[column]) for column in ids})


def _as_text(ids: pd.Series) -> pd.Series:
    """Ids as text, so that both tables meet whatever type a Parquet file gave them."""
    if ids.dtype.kind == "f":  # whole numbers become floats where some are missing
        ids = ids.astype("Int64")
    return ids.astype("string")


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow: pip install 'deeprec[parquet]'"
        ) from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
