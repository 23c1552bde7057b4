from __future__ import annotations

import numpy as np
import pytest

from deeprec.data import Catalog
from deeprec.trm import PhraseBook, PreferenceMix, PreferenceWriter
from deeprec.trm.phrases import split_phrases

KINDS = {"like": 1.0}
# Item i is like item i + 20.
SIMILAR = (np.arange(41)[:, None] + 20) % 40


def drawn(catalog: Catalog, rows: int = 400, **mix: float) -> tuple[list[str], np.ndarray]:
    """Preferences of examples whose history is items 1 and 2, and whose targets are 3 to 10."""
    shares = {"target": 0.0, "history": 0.0, "wrong": 0.0, "noise": 0.0, "named": 0.0, **mix}
    writer = PreferenceWriter(PhraseBook(catalog), SIMILAR, PreferenceMix(kinds=KINDS, **shares))
    targets = np.arange(rows) % 8 + 3
    history = np.tile([1, 2, 0], (rows, 1))
    rng = np.random.default_rng(0)
    ids = writer.for_training(history, np.full(rows, 2), targets, rng)
    return writer.book.join(ids), targets


def likes(catalog: Catalog, item: int) -> str:
    return "like " + catalog.title(item)


def test_no_shares_no_preferences(catalog: Catalog) -> None:
    assert set(drawn(catalog)[0]) == {""}


def test_history_preferences_are_about_the_history(catalog: Catalog) -> None:
    texts, _ = drawn(catalog, history=1.0)
    phrases = {phrase for text in texts for phrase in split_phrases(text)}
    assert phrases == {likes(catalog, 1), likes(catalog, 2)}


def test_target_preferences_name_neighbours_not_the_target(catalog: Catalog) -> None:
    texts, targets = drawn(catalog, target=1.0)
    assert texts == [likes(catalog, target + 20) for target in targets]


def test_named_targets(catalog: Catalog) -> None:
    texts, targets = drawn(catalog, target=1.0, named=1.0)
    assert texts == [likes(catalog, target) for target in targets]


def test_wrong_preferences_are_about_the_targets_of_others(catalog: Catalog) -> None:
    texts, targets = drawn(catalog, wrong=1.0)
    own = [likes(catalog, target + 20) for target in targets]
    right = [text == expected for text, expected in zip(texts, own, strict=True)]
    assert np.mean(right) < 0.3  # by chance one in eight
    assert set(texts) == set(own)


def test_noise_replaces_phrases_about_the_target(catalog: Catalog) -> None:
    texts, _ = drawn(catalog, target=1.0, noise=1.0)
    phrases = {phrase for text in texts for phrase in split_phrases(text)}
    assert phrases == {likes(catalog, 1), likes(catalog, 2)}


def test_shares_are_met(catalog: Catalog) -> None:
    texts, targets = drawn(catalog, rows=4000, target=0.2, history=0.3)
    about_target = [
        likes(catalog, target + 20) in text for text, target in zip(texts, targets, strict=True)
    ]
    assert np.mean(about_target) == pytest.approx(0.2, abs=0.03)
    assert np.mean([text == "" for text in texts]) == pytest.approx(0.5, abs=0.03)


def test_preferences_about_given_items(catalog: Catalog) -> None:
    writer = PreferenceWriter(PhraseBook(catalog), SIMILAR)
    texts = writer.about_items([[1], [], [5, 9, 13]] * 50, np.random.default_rng(0))
    one = {phrase for text in texts[::3] for phrase in split_phrases(text)}
    assert one == {"Action", "1981", "1980s", "Night", "like Night 1 (1981)"}
    assert set(texts[1::3]) == {""}
    assert max(len(split_phrases(text)) for text in texts) <= writer.mix.max_phrases
    again = writer.about_items([[1], [], [5, 9, 13]] * 50, np.random.default_rng(0))
    assert texts == again


@pytest.mark.parametrize(
    "bad",
    [{"target": 0.9, "history": 0.2}, {"wrong": -0.1}, {"kinds": {"mood": 1}}, {"max_phrases": 0}],
)
def test_bad_mixes_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="PreferenceMix"):
        PreferenceMix(**bad)
