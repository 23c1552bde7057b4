"""Titles, years and look-ups of the item catalogue."""

import pytest

from deeprec.data import Catalog


@pytest.fixture
def catalog() -> Catalog:
    return Catalog(
        titles=("Alien (1979)", "Aliens (1986)", "Twin Peaks"),
        categories=(("Horror", "Sci-Fi"), ("Action",), ()),
        keys=("a", "b", "c"),
    )


def test_items_are_numbered_from_one(catalog: Catalog) -> None:
    assert catalog.n_items == 3
    assert catalog.title(1) == "Alien (1979)"
    assert [catalog.find(title) for title in catalog.titles] == [1, 2, 3]


@pytest.mark.parametrize("item", [0, -1, 4])
def test_unknown_item_is_an_error(catalog: Catalog, item: int) -> None:
    with pytest.raises(IndexError, match=r"1\.\.3"):
        catalog.title(item)


def test_year_is_the_one_at_the_end(catalog: Catalog) -> None:
    assert [catalog.year(item) for item in (1, 2, 3)] == [1979, 1986, None]
    odd = Catalog(("Blade Runner (2049) cut", "1984 (1984)"), ((), ()), ("a", "b"))
    assert [odd.year(1), odd.year(2)] == [None, 1984]


def test_text_has_categories_only_where_there_are_some(catalog: Catalog) -> None:
    assert catalog.text(1) == "Alien (1979)\n  - categories: Horror, Sci-Fi"
    assert catalog.text(3) == "Twin Peaks"
    assert len(catalog.encoder_texts()) == 3
    assert "Horror" in catalog.encoder_texts()[0]


def test_exact_and_loose_look_up(catalog: Catalog) -> None:
    assert catalog.find(" alien (1979)") == 0
    assert catalog.find_loose("  alIEN (1979)\n") == 1
    assert catalog.find_loose("Alien") == 0


def test_titles_must_be_unique_and_as_many_as_keys() -> None:
    with pytest.raises(ValueError, match="unique"):
        Catalog(("A", "a "), ((), ()), ("1", "2"))
    with pytest.raises(ValueError, match="not empty"):
        Catalog(("A", " "), ((), ()), ("1", "2"))
    with pytest.raises(ValueError, match="one entry an item"):
        Catalog(("A",), ((), ()), ("1", "2"))
