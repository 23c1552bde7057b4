from __future__ import annotations

import numpy as np
import torch
from small_world import WordEncoder
from torch.nn import functional as F

from deeprec.data import Catalog
from deeprec.trm.phrases import Kind, PhraseBook, PhraseEncoder, split_phrases


def test_phrases_describe_their_items(catalog: Catalog) -> None:
    book = PhraseBook(catalog)
    rng = np.random.default_rng(0)

    def phrase(item: int, kind: Kind) -> str:
        return book.texts[int(book.draw(np.array([item]), np.array([kind]), rng)[0])]

    assert phrase(1, Kind.CATEGORY) == "Action"
    assert phrase(1, Kind.YEAR) == "1981"
    assert phrase(1, Kind.DECADE) == "1980s"
    assert phrase(1, Kind.WORD) == "Night"
    assert phrase(1, Kind.LIKE) == "like Night 1 (1981)"
    assert phrase(5, Kind.YEAR) == "like Night 5"  # has no year
    assert phrase(7, Kind.CATEGORY) == "like Night 7 (1987)"  # has no category
    assert phrase(0, Kind.CATEGORY) == ""


def test_all_phrases_of_a_kind_are_drawn() -> None:
    catalog = Catalog(("Up",), (("Drama", "War", "Comedy"),), ("1",))
    book = PhraseBook(catalog)
    ids = book.draw(np.ones(200, dtype=int), np.full(200, Kind.CATEGORY), np.random.default_rng(0))
    assert {book.texts[i] for i in ids} == {"Drama", "War", "Comedy"}


def test_a_separator_in_a_title_does_not_cut_its_phrase() -> None:
    book = PhraseBook(Catalog(("Me;  Myself (2000)",), ((),), ("1",)))
    text = book.join(np.array([[len(book.texts) - 1]]))[0]
    assert len(split_phrases(text)) == 1
    assert text == "like Me, Myself (2000)"


def test_joining_drops_repeats_and_nothing(catalog: Catalog) -> None:
    book = PhraseBook(catalog)
    assert book.join(np.array([[1, 0, 2, 1], [0, 0, 0, 0]])) == [
        f"{book.texts[1]}; {book.texts[2]}",
        "",
    ]


def test_a_preference_is_the_mean_of_its_phrases(encoder: WordEncoder) -> None:
    phrases = PhraseEncoder(encoder)
    vectors = phrases.encode(["Action; 2013 ;Action;", "", " Drama"])
    both = encoder.encode(["Action", "2013"]).sum(0)
    torch.testing.assert_close(vectors[0], F.normalize(both, dim=0))
    assert not vectors[1].any()
    torch.testing.assert_close(vectors[2:], encoder.encode(["Drama"]))
    assert not phrases.encode([" ; "]).any()
    assert phrases.encode([]).shape == (0, encoder.dim)


def test_every_phrase_is_encoded_once_a_call(encoder: WordEncoder) -> None:
    PhraseEncoder(encoder).encode(["a; b", "b; c", "a"])
    assert sorted(encoder.encoded) == ["a", "b", "c"]
