"""One category of Amazon Reviews 2023, as published on amazon-reviews-2023.github.io.

Hou et al., "Bridging Language and Items for Retrieval and Recommendation", arXiv 2403.03952.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd

from deeprec.data.tables import DataError, RawTables, check_columns, read_csv

__all__ = ["detect", "read"]

_META = ("meta_*.jsonl", "meta_*.jsonl.gz")
_NEEDED = ["user_id", "parent_asin", "rating", "timestamp"]


def detect(folder: Path) -> bool:
    """Whether the folder holds a meta_CATEGORY.jsonl, plain or gzip-ed."""
    return bool(_metadata_files(folder))


def read(folder: Path) -> RawTables:
    """Read meta_CATEGORY.jsonl and CATEGORY.csv (ratings only) or CATEGORY.jsonl (reviews).

    Each may be gzip-ed. Items are parent_asin; their categories are "categories", or
    "main_category" where those are empty. A broken line of JSON is an error.
    """
    metadata = _metadata_files(folder)
    if len(metadata) != 1:
        names = ", ".join(path.name for path in metadata) or "none"
        raise DataError(f"{folder}: expected one meta_CATEGORY.jsonl or .jsonl.gz, found {names}")
    category = metadata[0].name.removeprefix("meta_").split(".jsonl")[0]
    return RawTables(_interactions(folder, category), _items(metadata[0]))


def _metadata_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in _META for path in folder.glob(pattern))


def _interactions(folder: Path, category: str) -> pd.DataFrame:
    choices = [f"{category}{suffix}" for suffix in (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")]
    path = next((folder / name for name in choices if (folder / name).is_file()), None)
    if path is None:
        raise DataError(f"{folder}: no interactions; expected one of {', '.join(choices)}")
    if ".csv" in path.name:
        table = read_csv(path)
    else:
        table = pd.DataFrame(
            [[record.get(name) for name in _NEEDED] for record in _records(path)], columns=_NEEDED
        )
    check_columns(table, _NEEDED, path)
    return table[_NEEDED].rename(columns={"parent_asin": "item_id"})


def _items(path: Path) -> pd.DataFrame:
    rows = []
    for record in _records(path):
        categories = record.get("categories") or [record.get("main_category")]
        rows.append(
            (
                record.get("parent_asin"),
                unescape(record.get("title") or ""),
                tuple(unescape(category) for category in categories if category),
            )
        )
    return pd.DataFrame(rows, columns=["item_id", "title", "categories"])


def _records(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    with opener(path, "rt", encoding="utf-8") as lines:
        try:
            for line in lines:
                number += 1
                yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}") from error
        except (EOFError, OSError, UnicodeError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
