"""MovieLens as GroupLens publishes it: 100K, 1M (also 10M) and the latest sets (also 20M to 32M).

Harper & Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 2015.
"""

from __future__ import annotations

import re
from itertools import compress
from pathlib import Path

import pandas as pd

from deeprec.data.tables import DataError, RawTables, check_columns, read_csv

__all__ = [
    "detect_1m",
    "detect_100k",
    "detect_latest",
    "read_1m",
    "read_100k",
    "read_latest",
    "title_with_article_first",
]

# The flag columns of u.item, in order.
_GENRES_100K = (
    "unknown",
    *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller"),
    *("War", "Western"),
)
_COLUMNS_100K = ("item_id", "title", "released", "video_released", "url", *_GENRES_100K)
_NO_GENRES = {"(no genres listed)", "unknown", ""}

# An article that was moved behind the name, in the languages whose films are in the sets.
_ARTICLE_LAST = re.compile(
    r"^(?P<name>[^(]+), "
    r"(?P<article>The|An?|La|Les?|L'|Une?|El|L[ao]s|Il|Lo|Gli|Der|Die|Das|De|Den|Det)(?= \(|$)"
)

_RATING_COLUMNS = ["user_id", "item_id", "rating", "timestamp"]


def title_with_article_first(title: str) -> str:
    """ "Matrix, The (1999)" -> "The Matrix (1999)"; other titles stay as they are."""
    match = _ARTICLE_LAST.match(title)
    if match is None:
        return title
    space = "" if match["article"].endswith("'") else " "
    return f"{match['article']}{space}{match['name']}{title[match.end() :]}"


def detect_100k(folder: Path) -> bool:
    """Whether the folder holds u.data and u.item."""
    return (folder / "u.data").is_file() and (folder / "u.item").is_file()


def read_100k(folder: Path) -> RawTables:
    """Read u.data (tab-separated) and u.item ("|"-separated, latin-1, 19 genre flags)."""
    items = read_csv(folder / "u.item", sep="|", encoding="latin-1", names=_COLUMNS_100K, quoting=3)
    flags = items[list(_GENRES_100K)].to_numpy() == "1"
    genres = ["|".join(compress(_GENRES_100K, row)) for row in flags]
    return RawTables(
        interactions=read_csv(folder / "u.data", sep="\t", names=_RATING_COLUMNS),
        items=_items(items["item_id"], items["title"], pd.Series(genres)),
    )


def detect_1m(folder: Path) -> bool:
    """Whether the folder holds ratings.dat and movies.dat."""
    return (folder / "ratings.dat").is_file() and (folder / "movies.dat").is_file()


def read_1m(folder: Path) -> RawTables:
    """Read ratings.dat and movies.dat ("::"-separated; latin-1 in 1M, UTF-8 in 10M)."""
    movies = folder / "movies.dat"
    rows = [line.split("::") for line in _text(movies).splitlines() if line]
    for number, row in enumerate(rows, start=1):
        if len(row) != 3:
            raise DataError(
                f"{movies}: line {number} must be item::title::genres, got {'::'.join(row)!r}"
            )
    items = pd.DataFrame(rows, columns=["item_id", "title", "genres"])
    # Split at ":" the empty fields between two colons are the odd columns: this keeps the fast
    # parser, which takes one separating character only.
    ratings = read_csv(folder / "ratings.dat", sep=":", header=None, usecols=[0, 2, 4, 6])
    ratings.columns = pd.Index(_RATING_COLUMNS)
    return RawTables(ratings, _items(items["item_id"], items["title"], items["genres"]))


def detect_latest(folder: Path) -> bool:
    """Whether the folder holds ratings.csv and movies.csv."""
    return (folder / "ratings.csv").is_file() and (folder / "movies.csv").is_file()


def read_latest(folder: Path) -> RawTables:
    """Read ratings.csv (userId,movieId,rating,timestamp) and movies.csv (movieId,title,genres)."""
    ratings, movies = read_csv(folder / "ratings.csv"), read_csv(folder / "movies.csv")
    check_columns(ratings, ["userId", "movieId", "rating", "timestamp"], folder / "ratings.csv")
    check_columns(movies, ["movieId", "title", "genres"], folder / "movies.csv")
    return RawTables(
        interactions=ratings.rename(columns={"userId": "user_id", "movieId": "item_id"}),
        items=_items(movies["movieId"], movies["title"], movies["genres"]),
    )


def _items(keys: pd.Series, titles: pd.Series, genres: pd.Series) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "item_id": keys,
            "title": [title_with_article_first(title) for title in titles.fillna("")],
            "categories": [_categories(text) for text in genres.fillna("")],
        }
    )


def _categories(genres: str) -> tuple[str, ...]:
    return tuple(genre for genre in genres.split("|") if genre not in _NO_GENRES)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
