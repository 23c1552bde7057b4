from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_world import GENRES, WordEncoder

from deeprec.data import Dataset, LoadReport
from deeprec.trm import (
    PhraseEncoder,
    PreferenceAwareTRM,
    PreferenceMix,
    TrainedTRM,
    TRMTrainConfig,
    WrittenPreference,
    train_trm,
)
from deeprec.trm.examples import Examples, WrittenPreferences
from deeprec.trm.training import similar_items, validation_ndcg

CONFIG = TRMTrainConfig(
    hidden=16, inner=32, n_layers=1, n_experts=2, max_length=5, batch_size=32, max_epochs=6,
    patience=6, learning_rate=1e-2, dropout=0.1, dtype="fp32",
    mix=PreferenceMix(target=0.5, history=0.1, wrong=0.0, noise=0.0), lookahead=0.0, average=0.5,
)  # fmt: skip


def test_examples_are_all_positions_before_the_held_out_items(dataset: Dataset) -> None:
    examples = Examples(dataset, held_out=3, max_length=5)
    rows = np.concatenate([batch.rows for batch in examples.epoch(64, np.random.default_rng(0))])
    expected = np.concatenate(
        [
            np.arange(a + 1, b - 3)
            for a, b in zip(dataset.offsets, dataset.offsets[1:], strict=False)
        ]
    )
    assert np.array_equal(np.sort(rows), expected)


def test_the_last_examples_of_each_user(dataset: Dataset) -> None:
    everything, last = (Examples(dataset, 2, 5, per_user) for per_user in (None, 2))
    users = np.searchsorted(dataset.offsets, everything.rows, side="right") - 1
    expected = np.concatenate([everything.rows[users == u][-2:] for u in np.unique(users)])
    assert np.array_equal(last.rows, expected)


def test_histories_are_what_came_before(dataset: Dataset) -> None:
    examples = Examples(dataset, held_out=2, max_length=5)
    batch = examples.batch(examples.rows[::7])
    for row, history, length, target in zip(*batch, strict=True):
        first = dataset.offsets[np.searchsorted(dataset.offsets, row, side="right") - 1]
        expected = dataset.items[max(first, row - 5) : row]
        assert history[:length].tolist() == expected.tolist()
        assert not history[length:].any()
        assert target == dataset.items[row]


def test_no_examples_is_an_error(dataset: Dataset) -> None:
    short = Dataset(
        dataset.catalog, np.array([0, 4]), np.array([1, 2, 3, 4]), np.arange(4),
        LoadReport(source="made up", format="none"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="no training examples"):
        Examples(short, held_out=3, max_length=5)


@pytest.fixture(scope="module")
def trained(dataset: Dataset) -> TrainedTRM:
    return train_trm(dataset, WordEncoder(), CONFIG)


def test_the_best_epoch_is_kept(dataset: Dataset, trained: TrainedTRM) -> None:
    assert not trained.model.training
    assert trained.epochs[-1].loss < trained.epochs[0].loss
    best = max(epoch.ndcg for epoch in trained.epochs)
    validation = dataset.requests("valid", max_history=5)
    assert validation_ndcg(trained.model, validation) == pytest.approx(best)
    untrained = PreferenceAwareTRM(
        trained.model.config, trained.model.item_plm_embedding.weight[1:]
    )
    assert best > 1.5 * validation_ndcg(untrained, validation)


def test_a_preference_brings_what_it_names(dataset: Dataset, trained: TrainedTRM) -> None:
    """Every user asks for every genre in turn; each item is of one of the four."""
    test = dataset.requests("test", max_history=5)
    history, lengths = torch.from_numpy(test.history), torch.from_numpy(test.lengths)
    shares = []
    for number, genre in enumerate(GENRES):
        preference = PhraseEncoder(WordEncoder()).encode([genre] * len(history))
        found = trained.model.retrieve(history, lengths, preference, 5, exclude_history=True)
        shares.append(float(((found.indices - 1) % len(GENRES) == number).float().mean()))
    # Who ignores the preference gets exactly a quarter; 0.35 to 0.46 with seeds 0 to 5.
    assert np.mean(shares) > 0.3


def test_the_same_seed_gives_the_same_model(dataset: Dataset, encoder: WordEncoder) -> None:
    config = replace(CONFIG, max_epochs=1)
    first, second = (train_trm(dataset, encoder, config).model.state_dict() for _ in range(2))
    other = train_trm(dataset, encoder, replace(config, seed=1)).model.state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not torch.equal(first["item_embedding.weight"], other["item_embedding.weight"])


@pytest.mark.parametrize(("holdout", "hidden_items"), [("rl", 3), ("valid", 2)])
def test_held_out_items_do_not_matter(
    dataset: Dataset, encoder: WordEncoder, holdout: str, hidden_items: int
) -> None:
    """With other items in the held-out places the trained parameters stay the same."""
    items = dataset.items.copy()
    for end in dataset.offsets[1:]:
        items[end - hidden_items : end] = items[end - hidden_items : end][::-1] % 40 + 1
    other = replace(dataset, items=items)
    config = replace(CONFIG, holdout=holdout, max_epochs=1)
    states = [train_trm(data, encoder, config).model.state_dict() for data in (dataset, other)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_written_preferences_reach_their_examples(dataset: Dataset, encoder: WordEncoder) -> None:
    written = [
        WrittenPreference(1, 2, "Action"),
        WrittenPreference(0, 1, "Drama"),
        WrittenPreference(0, 1, "Horror"),
    ]
    preferences = WrittenPreferences(dataset, written, PhraseEncoder(encoder))
    second = int(dataset.offsets[1]) + 2
    rows = np.array([1, 3, second] * 20)
    vectors = torch.zeros(60, encoder.dim)
    preferences.replace(vectors, rows, 1.0, np.random.default_rng(0))
    action, drama, horror = encoder.encode(["Action", "Drama", "Horror"])
    torch.testing.assert_close(vectors[2::3], action.expand(20, -1))
    assert not vectors[1::3].any()
    drawn = {tuple(v.tolist()) for v in vectors[::3]}
    assert drawn == {tuple(drama.tolist()), tuple(horror.tolist())}
    unchanged = torch.zeros(60, encoder.dim)
    preferences.replace(unchanged, rows, 0.0, np.random.default_rng(0))
    assert not unchanged.any()


@pytest.mark.parametrize("position", [0, 30])
def test_written_preferences_need_a_position(
    dataset: Dataset, encoder: WordEncoder, position: int
) -> None:
    with pytest.raises(ValueError, match="position"):
        WrittenPreferences(dataset, [WrittenPreference(0, position, "Action")], encoder)


def test_training_takes_written_preferences(dataset: Dataset, encoder: WordEncoder) -> None:
    config = replace(CONFIG, max_epochs=1)
    written = [WrittenPreference(user, 1, "Comedy") for user in range(dataset.n_users)]
    plain = train_trm(dataset, encoder, config).model.state_dict()
    taught = train_trm(dataset, encoder, config, extra_preferences=written).model.state_dict()
    assert not torch.equal(plain["item_embedding.weight"], taught["item_embedding.weight"])


def test_similar_items_are_nearest_first_without_the_item_itself() -> None:
    texts = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert similar_items(texts, 2).tolist() == [[0, 0], [2, 4], [1, 4], [4, 2], [3, 2]]


@pytest.mark.parametrize(
    "bad", [{"holdout": "test"}, {"dtype": "fp8"}, {"batch_size": 0}, {"temperature": 0.0}]
)
def test_bad_configuration_names_the_field(bad: dict) -> None:
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        TRMTrainConfig(**bad)


def test_later_targets_stay_with_the_user(dataset: Dataset) -> None:
    examples = Examples(dataset, held_out=2, max_length=5, lookahead=0.5)
    rows, targets = [], []
    for batch in examples.epoch(64, np.random.default_rng(0)):
        rows.append(batch.rows)
        targets.append(batch.targets)
        assert (batch.history == examples.batch(batch.rows).history).all()
    row, target = np.concatenate(rows), np.concatenate(targets)
    assert np.array_equal(np.sort(row), examples.rows)
    last = dataset.offsets[np.searchsorted(dataset.offsets, row, side="right")] - 3
    skipped = []
    for first, end, item in zip(row, last, target, strict=True):
        window = dataset.items[first : end + 1].tolist()
        assert item in window  # never a held-out item, never another user's
        skipped.append(window.index(item))
    room = last - row
    assert np.mean(np.array(skipped)[room > 3] == 0) == pytest.approx(0.5, abs=0.1)
    assert max(skipped) > 1
