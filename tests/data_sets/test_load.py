"""Cleaning, filtering and numbering, and what the report says of them."""

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprec.data import DataConfig, DataError, Dataset, LoadReport, load_dataset
from deeprec.data.prepare import prepare
from deeprec.data.tables import RawTables


def tables(
    rows: list[tuple[object, ...]], titles: dict[str, str] | None = None, rating: bool = False
) -> RawTables:
    columns = ["user_id", "item_id", "timestamp"] + ["rating"] * rating
    interactions = pd.DataFrame(rows, columns=columns)
    titles = titles or {str(key): f"Title {key}" for key in interactions["item_id"].unique()}
    items = pd.DataFrame({"item_id": list(titles), "title": list(titles.values())})
    return RawTables(interactions, items.assign(categories=[()] * len(items)))


def prepared(raw: RawTables, k: int = 1, min_rating: float | None = None) -> Dataset:
    return prepare(raw, LoadReport("test", "none"), k, min_rating)


def check_counts(report: LoadReport) -> None:
    assert report.raw_interactions == report.interactions + sum(report.dropped.values())


def user(name: str, items: str, start: int = 0) -> list[tuple[object, ...]]:
    return [(name, key, start + step) for step, key in enumerate(items)]


def test_embedded_data_set() -> None:
    dataset = load_dataset()
    assert (dataset.n_users, dataset.catalog.n_items, len(dataset.items)) == (4333, 2414, 68055)
    report = dataset.report
    assert (report.raw_users, report.raw_items, report.raw_interactions) == (16554, 10506, 100000)
    check_counts(report)
    assert len(report.renamed) == 5
    lengths = np.diff(dataset.offsets)
    assert (lengths.min(), np.median(lengths), lengths.max()) == (5, 10, 275)
    assert np.bincount(dataset.items)[1:].min() == 5
    assert dataset.timestamps.dtype == np.int64
    assert pd.Timestamp("2013-02-28").timestamp() < dataset.timestamps.min()
    assert dataset.timestamps.max() < pd.Timestamp("2013-10-01").timestamp()
    for row in range(dataset.n_users):
        times = dataset.timestamps[dataset.offsets[row] : dataset.offsets[row + 1]]
        assert (np.diff(times) >= 0).all()
    assert all(dataset.catalog.year(item) for item in range(1, 2415))


def test_ties_are_broken_by_item_whatever_the_order_of_the_rows() -> None:
    rows = [("u", key, 7) for key in "dbca"] + user("v", "abcd")
    titles = {key: f"Title {key}" for key in "abcd"}
    expected = prepared(tables(rows, titles))
    assert expected.items.tolist() == [1, 2, 3, 4] * 2
    random.Random(0).shuffle(rows)
    shuffled = prepared(tables(sorted(rows, key=lambda row: row[0]), titles))
    np.testing.assert_array_equal(shuffled.items, expected.items)


def test_every_dropped_interaction_is_counted_under_its_reason() -> None:
    rows = [
        *user("u", "abcd"),
        ("u", "a", 99),  # again
        ("u", "zzz", 5),  # unknown item
        ("u", None, 5),
        (None, "a", 5),
        ("u", "b", None),
        ("u", "blank", 5),
        *user("short", "abc"),
    ]
    titles = {key: f"Title {key}" for key in "abcd"} | {"blank": "  "}
    dataset = prepared(tables(rows, titles))
    assert dataset.report.dropped == {
        "user, item or timestamp missing": 3,
        "item id is not in the item table": 1,
        "item has no title": 1,
        "user took the item before; first one kept": 1,
        "user with fewer than 4 interactions": 3,
    }
    check_counts(dataset.report)
    assert dataset.items.tolist() == [1, 2, 3, 4]
    text = str(dataset.report)
    assert "dropped 3 (user with fewer than 4 interactions)" in text
    assert "loaded  4 interactions, 1 users, 4 items" in text


def test_of_repeated_interactions_the_first_in_time_stays() -> None:
    dataset = prepared(tables([("u", "a", 50), *user("u", "abcd", start=60)]))
    assert dataset.timestamps.tolist() == [50, 61, 62, 63]


def test_ratings_filter_and_are_needed_only_then() -> None:
    rows = [
        ("u", "abcdef"[step], step, rating) for step, rating in enumerate([5, 4, 3, 4, 2, None])
    ]
    dataset = prepared(tables(rows, rating=True), min_rating=3)
    assert dataset.report.dropped == {"rating missing or below 3": 2}
    with pytest.raises(DataError, match="has no ratings"):
        prepared(tables(user("u", "abcd")), min_rating=3)


@pytest.mark.parametrize("wrong", ["2013-02-28", "inf", "soon"])
def test_timestamps_must_be_numbers(wrong: str) -> None:
    rows = [*user("u", "abcd"), ("u", "e", wrong)]
    with pytest.raises(DataError, match=f"'timestamp' must hold unix seconds.*{wrong}"):
        prepared(tables(rows))


def test_milliseconds_become_seconds() -> None:
    rows = [("u", key, 1_600_000_000_999 + 1000 * step) for step, key in enumerate("abcd")]
    dataset = prepared(tables(rows))
    assert dataset.timestamps.tolist() == [1_600_000_000 + step for step in range(4)]
    assert dataset.report.notes == ["timestamps are milliseconds, cut to seconds"]


def test_duplicate_titles_and_ids() -> None:
    titles = {
        "a": "Pusher (2012)",
        "b": "pusher  (2012)",
        "c": "Pusher (2) (2012)",
        "d": "Pusher (2012)",
        "e": "Untitled",
        "f": "Untitled",
        "unused": "Untitled",
    }
    raw = tables(user("u", "abcdef"), titles)
    raw.items = pd.concat([raw.items, raw.items.iloc[:1].assign(title="Another")])
    dataset = prepared(raw)
    assert dataset.catalog.titles == (
        "Pusher (2012)",
        "pusher (3) (2012)",
        "Pusher (2) (2012)",
        "Pusher (4) (2012)",
        "Untitled",
        "Untitled (2)",
    )
    assert [dataset.catalog.year(item) for item in (1, 2, 3, 4)] == [2012] * 4
    assert dataset.report.renamed[-1] == ("Untitled", "Untitled (2)")
    assert "renamed 3 duplicate titles" in str(dataset.report)
    assert dataset.report.notes == ["1 item ids occur twice; first one kept"]


def test_nothing_left_is_an_error_with_the_report() -> None:
    with pytest.raises(DataError, match=r"lower DataConfig\.min_interactions(.|\n)*dropped 4"):
        prepared(tables(user("u", "abcd")), k=5)
    with pytest.raises(DataError, match="no interactions are left"):
        prepared(tables([("u", "a", 1)], {"b": "other"}))
    with pytest.raises(ValueError, match="min_interactions"):
        DataConfig(min_interactions=0)


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=40, max_size=90),
    k=st.integers(1, 6),
)
def test_core_is_the_largest_set_where_everybody_has_k(
    pairs: list[tuple[int, int]], k: int
) -> None:
    rows = [(f"u{u}", f"i{i}", step) for step, (u, i) in enumerate(pairs)]
    left = set(pairs)
    while True:
        kept = {
            (u, i)
            for u, i in left
            if sum(v == u for v, _ in left) >= max(k, 4) and sum(j == i for _, j in left) >= k
        }
        if kept == left:
            break
        left = kept
    if not left:
        with pytest.raises(DataError):
            prepared(tables(rows), k)
        return
    dataset = prepared(tables(rows), k)
    check_counts(dataset.report)
    keys = dataset.catalog.keys
    loaded = sorted(keys[item - 1] for item in dataset.items)
    assert loaded == sorted(f"i{i}" for _, i in left)
    assert dataset.n_users == len({u for u, _ in left})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"user_id,item_id,timestamp\nu,i,5,surplus\n", "more fields than the header"),
        (b"user_id,item_id,timestamp\nu,i,5\nu,i,5,surplus\n", "cannot be read"),
        (b"user_id,item_id\nu,i\n", r"missing column\(s\) timestamp; found user_id, item_id"),
        (b"user_id,item_id,timestamp\n\xff,i,5\n", "cannot be read"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "interactions.csv").write_bytes(content)
    (tmp_path / "items.csv").write_text("item_id,title,categories\ni,NA,\n")
    with pytest.raises(DataError, match=f"interactions.csv: .*{message}"):
        load_dataset(DataConfig(path=str(tmp_path)))


def test_titles_that_look_like_missing_values_are_titles(tmp_path: Path) -> None:
    rows = "".join(f"u,{key},{key}\n" for key in range(4))
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\n" + rows)
    (tmp_path / "items.csv").write_text(
        "item_id,title,categories\n0,NA,None\n1,null,\n2,None,a | b\n3,nan,\n"
    )
    catalog = load_dataset(DataConfig(path=str(tmp_path), min_interactions=1)).catalog
    assert catalog.titles == ("NA", "null", "None", "nan")
    assert catalog.categories == (("None",), (), ("a", "b"), ())
