"""Prompts say what was known before the request, and nothing of the answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from policy_world import World

from deeprec.policy.pretrain import PretrainConfig, _windows
from deeprec.policy.tokenizer import week_token
from deeprec.policy.warmstart import WarmStartConfig, _training_requests
from deeprec.rollout import protocol


@pytest.mark.parametrize("split", ["rl", "valid", "test"])
def test_a_prompt_is_the_dated_history_and_the_date(world: World, split: str) -> None:
    requests = world.dataset.requests(split)
    tokenizer = world.prompts.tokens.tokenizer
    catalog = world.dataset.catalog
    for row in range(0, len(requests), 7):
        lines = [
            week_token(int(time)) + catalog.title(int(item))
            for item, time in zip(
                requests.history[row], requests.history_timestamps[row], strict=True
            )
            if item
        ]
        date = week_token(int(requests.timestamps[row]))
        expected = f"History:{''.join(lines)}{date}?\n{protocol.PROMPT_END}"
        assert tokenizer.decode(world.prompts.build(requests, row)) == expected


@pytest.mark.parametrize("split", ["rl", "valid", "test"])
def test_the_target_changes_nothing(world: World, split: str) -> None:
    requests = world.dataset.requests(split)
    other = replace(requests, targets=requests.targets % world.dataset.catalog.n_items + 1)
    titles = world.prompts.tokens.titles
    for row in range(len(requests)):
        prompt = world.prompts.build(requests, row)
        assert prompt == world.prompts.build(other, row)
        assert titles[requests.targets[row]] not in prompt


def test_training_windows_hold_nothing_that_is_held_out(world: World) -> None:
    dataset, tokens = world.dataset, world.prompts.tokens
    item_of = {int(token): item for item, token in enumerate(tokens.titles)}
    config = PretrainConfig(window=5, batch_size=8)
    allowed = [set(dataset.items[dataset.train_slice(user)]) for user in range(dataset.n_users)]
    for batch in _windows(dataset, tokens, config, np.random.default_rng(0)):
        for window in batch:
            assert len(window) % 2 == 0 and len(window) <= 2 * config.window
            items = [item_of[int(token)] for token in window[1::2]]
            assert any(set(items) <= own for own in allowed)
            # A week, then its title: a title never stands where only its week may be known.
            assert not set(window[0::2].tolist()) & set(tokens.titles.tolist())


def test_training_windows_cover_every_training_item_once(world: World) -> None:
    dataset, tokens = world.dataset, world.prompts.tokens
    windows = [
        window
        for batch in _windows(dataset, tokens, PretrainConfig(), np.random.default_rng(0))
        for window in batch
    ]
    read = np.sort(np.concatenate([window[1::2] for window in windows]))
    assert np.array_equal(read, np.sort(tokens.titles[dataset.train().items]))


def test_warm_start_requests_never_hold_their_target_or_what_comes_later(world: World) -> None:
    dataset = world.dataset
    config = WarmStartConfig(conversations=400, dropped=0.4)
    requests = _training_requests(dataset, config, np.random.default_rng(1))
    titles = world.prompts.tokens.titles
    assert (requests.lengths >= 1).all() and (requests.lengths < 20).all()
    for row in range(len(requests)):
        user, length = int(requests.users[row]), int(requests.lengths[row])
        own = dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]].tolist()
        target = own.index(int(requests.targets[row]))
        assert target <= len(own) - 3  # the RL target is asked about at most
        history = requests.history[row, :length].tolist()
        places = [own.index(item) for item in history]
        assert places == sorted(places) and places[-1] == target - 1
        assert not requests.history[row, length:].any()
        assert titles[requests.targets[row]] not in world.prompts.build(requests, row)


def test_thinned_histories_keep_the_dates_of_their_items(world: World) -> None:
    dataset = world.dataset
    config = WarmStartConfig(conversations=100, dropped=0.5)
    requests = _training_requests(dataset, config, np.random.default_rng(2))
    for row in range(len(requests)):
        user = int(requests.users[row])
        rows = slice(dataset.offsets[user], dataset.offsets[user + 1])
        dates = dict(zip(dataset.items[rows], dataset.timestamps[rows], strict=True))
        n = int(requests.lengths[row])
        history = requests.history[row, :n].tolist()
        assert requests.history_timestamps[row, :n].tolist() == [dates[item] for item in history]


def test_a_date_outside_the_data_set_is_an_error(world: World) -> None:
    with pytest.raises(ValueError, match="1971-W"):
        world.prompts.tokens.week(40_000_000)
