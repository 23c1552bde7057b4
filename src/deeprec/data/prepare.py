"""From raw tables to a data set: cleaning, k-core, numbering, time order, unique titles."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from deeprec.data.catalog import Catalog
from deeprec.data.dataset import HELD_OUT, Dataset
from deeprec.data.report import LoadReport
from deeprec.data.tables import DataError, RawTables

__all__ = ["prepare"]

# Unix seconds stay below this until the year 5138; milliseconds have been above it since 1973.
_MILLISECONDS_ABOVE = 1e11

# One item of history must remain before the held-out ones.
_SHORTEST_USER = HELD_OUT + 1

_YEAR_AT_END = re.compile(r" \(\d{4}\)$")


def prepare(
    tables: RawTables, report: LoadReport, min_interactions: int, min_rating: float | None
) -> Dataset:
    """Clean, filter and number ``tables``; ``report`` is filled on the way.

    Interactions of one user are ordered by time and, where times tie, by item number, so the
    result does not depend on the order of the rows. Items are numbered in the order of the item
    table, users in the order in which they first appear.

    Raises DataError when nothing is left.
    """
    report.notes += tables.notes
    interactions = tables.interactions
    report.raw_interactions = len(interactions)
    report.raw_users = interactions["user_id"].nunique()
    report.raw_items = interactions["item_id"].nunique()
    interactions = _clean(interactions, report)
    if min_rating is not None:
        interactions = _with_rating(interactions, min_rating, report)
    known = interactions["item_id"].isin(tables.items["item_id"])
    interactions = _keep(interactions, known, "item id is not in the item table", report)
    items = _titled_items(tables.items, interactions["item_id"], report)
    titled = interactions["item_id"].isin(items["item_id"])
    interactions = _keep(interactions, titled, "item has no title", report)
    interactions = interactions.assign(
        user=pd.factorize(interactions["user_id"])[0],
        item=pd.Index(items["item_id"]).get_indexer(interactions["item_id"]),
    )[["user", "item", "timestamp"]]
    interactions = interactions.sort_values(["user", "timestamp", "item"], kind="stable")
    first = ~interactions.duplicated(["user", "item"])
    interactions = _keep(interactions, first, "user took the item before; first one kept", report)
    interactions = _core(interactions, min_interactions, report)
    if interactions.empty:
        raise DataError(
            f"no interactions are left of {report.source}; lower DataConfig.min_interactions "
            f"(now {min_interactions}) or min_rating. What happened:\n{report}"
        )
    return _number(interactions, items, report)


def _keep(frame: pd.DataFrame, mask: pd.Series, reason: str, report: LoadReport) -> pd.DataFrame:
    report.drop(reason, int((~mask).sum()))
    return frame[mask]


def _clean(interactions: pd.DataFrame, report: LoadReport) -> pd.DataFrame:
    """Drop rows with an empty id or time, and bring timestamps to int64 seconds."""
    complete = interactions[["user_id", "item_id", "timestamp"]].notna().all(axis=1)
    interactions = _keep(interactions, complete, "user, item or timestamp missing", report)
    seconds = _numbers(interactions["timestamp"], "timestamp", "unix seconds or milliseconds")
    if seconds.median() > _MILLISECONDS_ABOVE:
        report.notes.append("timestamps are milliseconds, cut to seconds")
        seconds = seconds // 1000
    return interactions.assign(timestamp=seconds.astype("int64"))


def _with_rating(interactions: pd.DataFrame, min_rating: float, report: LoadReport) -> pd.DataFrame:
    if "rating" not in interactions.columns:
        raise DataError(f"min_rating={min_rating} was given, but {report.source} has no ratings")
    ratings = _numbers(interactions["rating"], "rating", "numbers")
    return _keep(
        interactions, ratings >= min_rating, f"rating missing or below {min_rating:g}", report
    )


def _numbers(column: pd.Series, name: str, expected: str) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = ~np.isfinite(numbers) & column.notna()
    if wrong.any():
        raise DataError(
            f"column {name!r} must hold {expected}, got {column[wrong].iloc[0]!r}; convert it "
            "or name another column in DataConfig.columns"
        )
    return numbers


def _titled_items(items: pd.DataFrame, used: pd.Series, report: LoadReport) -> pd.DataFrame:
    """The items that occur in interactions and have a title, each id and each title once."""
    items = items[items["item_id"].isin(used.unique())]
    repeated = items.duplicated("item_id")
    if repeated.any():
        report.notes.append(f"{int(repeated.sum()):,} item ids occur twice; first one kept")
        items = items[~repeated]
    titles = items["title"].fillna("").str.split().str.join(" ")
    items = items.assign(title=titles)[titles != ""]
    unique = _unique(items["title"].tolist())
    report.renamed = tuple(
        (old, new) for old, new in zip(items["title"], unique, strict=True) if old != new
    )
    return items.assign(title=unique)


def _unique(titles: list[str]) -> list[str]:
    """Titles with "(2)", "(3)", ... put before the year of each repetition, ignoring case."""
    taken = {title.lower() for title in titles}
    copies: dict[str, int] = {}
    result = []
    for title in titles:
        key = title.lower()
        unique = title
        if key in copies:
            while unique.lower() in taken:
                copies[key] += 1
                unique = _numbered(title, copies[key])
            taken.add(unique.lower())
        else:
            copies[key] = 1
        result.append(unique)
    return result


def _numbered(title: str, number: int) -> str:
    year = _YEAR_AT_END.search(title)
    return f"{title[: year.start()]} ({number}){year[0]}" if year else f"{title} ({number})"


def _core(interactions: pd.DataFrame, k: int, report: LoadReport) -> pd.DataFrame:
    """Repeat until every user and every item has k interactions (users at least 4)."""
    user_minimum = max(k, _SHORTEST_USER)
    while True:
        before = len(interactions)
        counts = interactions.groupby("item")["user"].transform("size")
        interactions = _keep(
            interactions, counts >= k, f"item with fewer than {k} interactions", report
        )
        counts = interactions.groupby("user")["item"].transform("size")
        interactions = _keep(
            interactions,
            counts >= user_minimum,
            f"user with fewer than {user_minimum} interactions",
            report,
        )
        if len(interactions) == before:
            return interactions


def _number(interactions: pd.DataFrame, items: pd.DataFrame, report: LoadReport) -> Dataset:
    rows, item_codes = np.unique(interactions["item"].to_numpy(), return_inverse=True)
    _, user_counts = np.unique(interactions["user"].to_numpy(), return_counts=True)
    kept = items.iloc[rows]
    report.interactions, report.users, report.items = len(interactions), len(user_counts), len(rows)
    return Dataset(
        catalog=Catalog(
            titles=tuple(kept["title"]),
            categories=tuple(kept["categories"]),
            keys=tuple(kept["item_id"]),
        ),
        offsets=np.concatenate([[0], np.cumsum(user_counts)]).astype(np.int64),
        items=item_codes.astype(np.int64) + 1,
        timestamps=interactions["timestamp"].to_numpy(dtype=np.int64),
        report=report,
    )
