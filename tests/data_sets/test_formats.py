"""Every file format, written here as its publishers describe it."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from deeprec.data import DataConfig, DataError, Dataset, load_dataset
from deeprec.data.formats import FORMATS
from deeprec.data.formats.movielens import title_with_article_first

TITLES = {
    "10": "Matrix, The (1999)",
    "20": "Alien (1979)",
    "30": "Am\u00e9lie (2001)",
    "40": "City of Lost Children, The (Cit\u00e9 des enfants perdus, La) (1995)",
}
GENRES = {"10": ("Action", "Sci-Fi"), "20": ("Horror",), "30": ("Comedy", "Romance"), "40": ()}
TIDY = (
    "The Matrix (1999)",
    "Alien (1979)",
    "Am\u00e9lie (2001)",
    "The City of Lost Children (Cit\u00e9 des enfants perdus, La) (1995)",
)


@dataclass
class Tiny:
    """Three users who took the same four items, in different orders."""

    titles: dict[str, str]
    genres: dict[str, tuple[str, ...]]
    tidy: tuple[str, ...]
    rows: list[tuple[str, str, int, int]]
    """user, item, rating, unix seconds"""
    sequences: list[list[int]]
    """what loading it with min_interactions=1 must give"""


@pytest.fixture
def tiny() -> Tiny:
    keys = list(TITLES)
    sequences = [[1, 2, 3, 4], [4, 3, 2, 1], [2, 4, 1, 3]]
    rows = [
        (f"u{user}", keys[item - 1], 1 + (user + item) % 5, 880_000_000 + 10 * step)
        for user, sequence in enumerate(sequences)
        for step, item in enumerate(sequence)
    ]
    return Tiny(TITLES, GENRES, TIDY, rows, sequences)


def load(path: Path, **options: object) -> Dataset:
    return load_dataset(DataConfig(path=str(path), min_interactions=1, **options))


def check(dataset: Dataset, tiny: Tiny, name: str) -> None:
    """All formats must give the same data set."""
    assert dataset.report.format == name
    assert dataset.catalog.titles == tiny.tidy
    assert dataset.catalog.categories == tuple(tiny.genres.values())
    assert dataset.catalog.keys == tuple(tiny.titles)
    parts = np.split(dataset.items, dataset.offsets[1:-1])
    assert [part.tolist() for part in parts] == tiny.sequences
    assert dataset.timestamps.tolist() == [row[3] for row in tiny.rows]
    assert dataset.report.dropped == {}


def write_folder(folder: Path, tiny: Tiny, suffix: str = ".csv") -> None:
    interactions = pd.DataFrame(tiny.rows, columns=["user_id", "item_id", "rating", "timestamp"])
    items = pd.DataFrame(
        {
            "item_id": list(tiny.titles),
            "title": tiny.tidy,
            "categories": ["|".join(genres) for genres in tiny.genres.values()],
        }
    )
    for name, table in (("interactions", interactions), ("items", items)):
        if suffix == ".parquet":
            table.to_parquet(folder / f"{name}.parquet")
        else:
            table.to_csv(folder / f"{name}{suffix}", index=False)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_folder(tmp_path: Path, tiny: Tiny, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    write_folder(tmp_path, tiny, suffix)
    check(load(tmp_path), tiny, "folder")


def test_parquet_with_numeric_ids_and_lists(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pd.DataFrame(
        {
            "user_id": [1.0] * 4 + [None],
            "item_id": [1, 2, 3, 4, 1],
            "timestamp": np.arange(5),
        }
    ).to_parquet(tmp_path / "interactions.parquet")
    pd.DataFrame(
        {
            "item_id": pd.array([1, 2, 3, 4], dtype="Int32"),
            "title": list("abcd"),
            "categories": [["x", "y"], [], None, ["z"]],
        }
    ).to_parquet(tmp_path / "items.parquet")
    dataset = load(tmp_path)
    assert dataset.items.tolist() == [1, 2, 3, 4]
    assert dataset.catalog.categories == (("x", "y"), (), (), ("z",))
    assert dataset.report.dropped == {"user, item or timestamp missing": 1}


def test_folder_with_other_column_names(tmp_path: Path, tiny: Tiny) -> None:
    write_folder(tmp_path, tiny)
    for file in ("interactions.csv", "items.csv"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        (tmp_path / file).write_text(text.replace("item_id", "movie", 1), encoding="utf-8")
    with pytest.raises(DataError, match=r"missing column\(s\) item_id; found .*movie"):
        load(tmp_path)
    check(load(tmp_path, columns={"item_id": "movie"}), tiny, "folder")


GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


def write_movielens_100k(folder: Path, tiny: Tiny) -> None:
    rows = sorted(tiny.rows, key=lambda row: (row[0], row[1]))  # u.data is not sorted by time
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    lines = []
    for key, title in tiny.titles.items():
        flags = [str(int(name in tiny.genres[key])) for name in GENRES_100K]
        if not tiny.genres[key]:
            flags[0] = "1"
        lines.append("|".join([key, title, "01-Jan-1995", "", "http://us.imdb.com/", *flags]))
    (folder / "u.item").write_text("\n".join(lines) + "\n", encoding="latin-1")


def test_movielens_100k(tmp_path: Path, tiny: Tiny) -> None:
    write_movielens_100k(tmp_path, tiny)
    check(load(tmp_path), tiny, "movielens-100k")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_movielens_1m(tmp_path: Path, tiny: Tiny, encoding: str) -> None:
    ratings = "".join("::".join(map(str, row)) + "\n" for row in tiny.rows)
    (tmp_path / "ratings.dat").write_text(ratings)
    movies = "".join(
        f"{key}::{title}::{'|'.join(tiny.genres[key]) or '(no genres listed)'}\n"
        for key, title in tiny.titles.items()
    )
    (tmp_path / "movies.dat").write_text(movies, encoding=encoding)
    check(load(tmp_path), tiny, "movielens-1m")


def write_movielens_latest(folder: Path, tiny: Tiny) -> None:
    ratings = pd.DataFrame(tiny.rows, columns=["userId", "movieId", "rating", "timestamp"])
    ratings.to_csv(folder / "ratings.csv", index=False)
    genres = ["|".join(names) or "(no genres listed)" for names in tiny.genres.values()]
    pd.DataFrame(
        {"movieId": list(tiny.titles), "title": list(tiny.titles.values()), "genres": genres}
    ).to_csv(folder / "movies.csv", index=False)


def test_movielens_latest(tmp_path: Path, tiny: Tiny) -> None:
    write_movielens_latest(tmp_path, tiny)
    check(load(tmp_path), tiny, "movielens-latest")


@pytest.mark.parametrize(
    ("title", "tidy"),
    [
        ("Boat, Das (1981)", "Das Boat (1981)"),
        ("Avventura, L' (1960)", "L'Avventura (1960)"),
        ("Tinker, Tailor, Soldier, Spy (1979)", "Tinker, Tailor, Soldier, Spy (1979)"),
        ("Das Boot (Boat, The) (1981)", "Das Boot (Boat, The) (1981)"),
        ("American President, The", "The American President"),
        ("I Love You, Man (2009)", "I Love You, Man (2009)"),
    ],
)
def test_article_goes_first(title: str, tidy: str) -> None:
    assert title_with_article_first(title) == tidy


def write_amazon(folder: Path, tiny: Tiny, interactions: str, zipped: bool) -> None:
    suffix = ".gz" if zipped else ""
    opener = gzip.open if zipped else open
    with opener(folder / f"meta_Video_Games.jsonl{suffix}", "wt", encoding="utf-8") as file:
        for key, title in zip(tiny.titles, tiny.tidy, strict=True):
            record = {"parent_asin": key, "title": title, "categories": list(tiny.genres[key])}
            file.write(json.dumps(record | {"main_category": None, "features": []}) + "\n")
    with opener(folder / f"Video_Games.{interactions}{suffix}", "wt", encoding="utf-8") as file:
        if interactions == "csv":
            file.write("user_id,parent_asin,rating,timestamp\n")
        for user, item, rating, seconds in tiny.rows:
            milliseconds = 1000 * seconds + 1_234
            if interactions == "csv":
                file.write(f"{user},{item},{rating}.0,{milliseconds}\n")
            else:
                record = {"user_id": user, "parent_asin": item, "asin": "other", "text": "fine"}
                record |= {"rating": float(rating), "timestamp": milliseconds}
                file.write(json.dumps(record) + "\n")


@pytest.mark.parametrize("interactions", ["csv", "jsonl"])
@pytest.mark.parametrize("zipped", [False, True])
def test_amazon(tmp_path: Path, tiny: Tiny, interactions: str, zipped: bool) -> None:
    tiny.rows = [(user, item, rating, 10 * seconds) for user, item, rating, seconds in tiny.rows]
    write_amazon(tmp_path, tiny, interactions, zipped)
    dataset = load(tmp_path)
    assert dataset.report.notes == ["timestamps are milliseconds, cut to seconds"]
    tiny.rows = [(*row[:3], row[3] + 1) for row in tiny.rows]
    check(dataset, tiny, "amazon-2023")


def test_amazon_main_category_html_and_empty_titles(tmp_path: Path) -> None:
    records = [
        {"parent_asin": "A", "title": "Salt &amp; Pepper", "categories": []},
        {"parent_asin": "B", "title": "  Two\n lines ", "categories": ["Games", "PC &amp; Mac"]},
        {"parent_asin": "C", "title": None, "categories": []},
        *({"parent_asin": key, "title": key, "categories": []} for key in "DE"),
    ]
    lines = [json.dumps(record | {"main_category": "Toys"}) for record in records]
    (tmp_path / "meta_Toys.jsonl").write_text("\n".join(lines))
    rows = [f"u,{key},5.0,{step}" for step, key in enumerate("ABCDEX")]
    (tmp_path / "Toys.csv").write_text("user_id,parent_asin,rating,timestamp\n" + "\n".join(rows))
    dataset = load(tmp_path)
    assert dataset.catalog.titles[:2] == ("Salt & Pepper", "Two lines")
    assert dataset.catalog.categories[:2] == (("Toys",), ("Games", "PC & Mac"))
    assert dataset.report.dropped == {
        "item id is not in the item table": 1,
        "item has no title": 1,
    }


def test_amazon_broken_files_are_named(tmp_path: Path, tiny: Tiny) -> None:
    write_amazon(tmp_path, tiny, "csv", zipped=True)
    whole = (tmp_path / "meta_Video_Games.jsonl.gz").read_bytes()
    (tmp_path / "meta_Video_Games.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"meta_Video_Games.jsonl.gz: cannot be read"):
        load(tmp_path)
    (tmp_path / "meta_Video_Games.jsonl.gz").unlink()
    (tmp_path / "meta_Video_Games.jsonl").write_text('{"parent_asin": "A"}\n{"parent')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        load(tmp_path)
    (tmp_path / "Video_Games.csv.gz").unlink()
    with pytest.raises(DataError, match=r"no interactions; expected one of Video_Games\.csv"):
        load(tmp_path)


def test_recbole_movies(tmp_path: Path, tiny: Tiny) -> None:
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(map(str, row)) for row in tiny.rows]
    (tmp_path / "ml-100k.inter").write_text("\n".join(lines))
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for key, title in tiny.titles.items():
        lines.append(f"{key}\t{title[:-7]}\t{title[-5:-1]}\t{' '.join(tiny.genres[key])}")
    (tmp_path / "ml-100k.item").write_text("\n".join(lines), encoding="utf-8")
    check(load(tmp_path), tiny, "recbole")


def test_recbole_amazon(tmp_path: Path) -> None:
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"u\t{key}\t5.0\t{1.4e9 + step}" for step, key in enumerate("ABCD")]
    (tmp_path / "Amazon_CDs.inter").write_text("\n".join(lines))
    lines = ["item_id:token\tcategories:token_seq\ttitle:token\tprice:float"]
    lines += [f'{key}\t\'CDs & Vinyl\', "Children\'s Music"\t"{key}" side\t9.9' for key in "ABCD"]
    (tmp_path / "Amazon_CDs.item").write_text("\n".join(lines))
    dataset = load(tmp_path)
    assert dataset.catalog.titles[0] == '"A" side'
    assert dataset.catalog.categories[0] == ("CDs & Vinyl", "Children's Music")
    assert dataset.timestamps.tolist() == [1_400_000_000 + step for step in range(4)]


def test_recbole_without_titles(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n")
    with pytest.raises(DataError, match=r"expected one \.item file, found none"):
        load(tmp_path)
    (tmp_path / "x.item").write_text("item_id:token\tlabel:token\tgenre:token_seq\ni\tt\tg\n")
    with pytest.raises(DataError, match=r"missing column\(s\) title"):
        load(tmp_path)
    with pytest.raises(DataError, match="no interactions are left"):  # the title is found now
        load(tmp_path, columns={"title": "label"})


def test_format_is_found_or_asked_for(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(DataError, match="must be a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="fits no known format"):
        load(tmp_path)
    write_folder(tmp_path, tiny)
    write_movielens_latest(tmp_path, tiny)
    with pytest.raises(DataError, match=r"several formats \(folder, movielens-latest\)"):
        load(tmp_path)
    for name in ("folder", "movielens-latest"):
        check(load(tmp_path, format=name), tiny, name)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_an_explicit_format_runs_or_raises(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("nothing to load")
    with pytest.raises(DataError):
        load(tmp_path, format=name)


def test_unknown_format_and_columns(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(DataError, match="format must be one of folder, "):
        load(tmp_path, format="csv")
    with pytest.raises(ValueError, match="columns must map"):
        DataConfig(columns={"user": "u"})
    write_movielens_latest(tmp_path, tiny)
    with pytest.raises(DataError, match="this format fixes its columns"):
        load(tmp_path, columns={"user_id": "userId"})
