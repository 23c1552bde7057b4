"""Warm-start conversations keep to the protocol and say only what may be known."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from policy_world import World

from deeprec.data import Catalog, Requests
from deeprec.policy.tokenizer import LIKE, PHRASE_SEPARATOR
from deeprec.policy.warmstart import (
    IGNORE,
    WarmStartConfig,
    _Conversation,
    _training_requests,
    _Writer,
    beliefs_of,
    preference_from_titles,
    warm_start,
    written_preferences,
)
from deeprec.rewards.rules import broken_in_text
from deeprec.rewards.rules import written_preferences as preferences_in
from deeprec.rollout import protocol

CONFIG = WarmStartConfig(conversations=60, titles=2)


def written(world: World, config: WarmStartConfig) -> tuple[Requests, list[_Conversation]]:
    requests = _training_requests(world.dataset, config, np.random.default_rng(0))
    beliefs = beliefs_of(world.policy(), world.prompts, world.env.trm, requests, config)
    return requests, _Writer(world.prompts, world.env, config, 0).write(requests, beliefs)


def response(world: World, requests: Requests, row: int, talk: _Conversation) -> str:
    prompt = len(world.prompts.build(requests, row))
    return world.prompts.tokens.tokenizer.decode(talk.ids[prompt:])


@pytest.mark.parametrize("knowledge", ["own", "none"])
def test_conversations_obey_the_rules(world: World, knowledge: str) -> None:
    requests, talks = written(world, replace(CONFIG, knowledge=knowledge))
    turns = []
    for row, talk in enumerate(talks):
        text = response(world, requests, row, talk)
        assert not broken_in_text(text, 10), text
        asked = preferences_in(text)
        turns.append(len(asked))
        first = text.split(protocol.PREFERENCE_CLOSE)[0] + protocol.PREFERENCE_CLOSE
        assert protocol.read_preference(first) == asked[0]
        lines = protocol.read_final_list(text)
        assert lines is not None
        listed = [world.env.catalog.find(line.title) for line in lines]
        assert set(listed) <= set(talk.retrieved) and len(set(listed)) == len(listed)
        assert not set(listed) & set(requests.history[row].tolist())
    assert set(turns) == {2, 3}  # a first call finds 6 items, which do not fill a list


def test_a_catalogue_that_is_exhausted_ends_the_questions(world: World) -> None:
    world.env.k = 12  # 24 items: a second answer brings what is left, and a third has nothing
    requests, talks = written(world, replace(CONFIG, titles=8))
    for row, talk in enumerate(talks):
        history = requests.history[row].tolist()
        left = {*range(1, 25)} - {*history}
        assert set(talk.retrieved) <= left and len(set(talk.retrieved)) == len(talk.retrieved)
        assert all(talk.ids[due.position] != 0 for due in talk.titles)


def test_only_the_policys_own_tokens_are_learnt(world: World) -> None:
    requests, talks = written(world, CONFIG)
    decode = world.prompts.tokens.tokenizer.decode
    for row, talk in enumerate(talks):
        prompt = len(world.prompts.build(requests, row))
        assert talk.labels[:prompt] == [IGNORE] * prompt
        assert len(talk.labels) == len(talk.ids)
        learnt = decode([token for token in talk.labels if token != IGNORE])
        assert protocol.ITEMS_OPEN not in learnt and protocol.ITEMS_CLOSE not in learnt
        assert learnt.count(protocol.PREFERENCE_CLOSE) == len(preferences_in(decode(talk.ids)))
        assert learnt.endswith(protocol.LIST_CLOSE)


def test_titles_are_due_among_what_was_retrieved_and_is_not_listed(world: World) -> None:
    _, talks = written(world, CONFIG)
    titles = world.prompts.tokens.titles
    for talk in talks:
        listed = [due for due in talk.titles if due.among is not None]
        assert len(listed) == min(10, len(talk.retrieved))
        for line, due in enumerate(listed):
            assert set(due.among.tolist()) == set(talk.retrieved)
            before = [talk.ids[earlier.position] for earlier in listed[:line]]
            assert titles[due.without].tolist() == before
        for due in talk.titles:
            here = int(np.flatnonzero(titles == talk.ids[due.position])[0])
            assert here > 0 and here not in due.without


def test_a_title_is_predicted_from_what_stands_before_it(world: World) -> None:
    # In a list the position before a title holds its number; in a preference, "like ".
    _, talks = written(world, CONFIG)
    decode = world.prompts.tokens.tokenizer.decode
    for talk in talks:
        for due in talk.titles:
            before = decode([talk.ids[due.position - 1]])
            assert before.endswith(". ") if due.among is not None else before == LIKE


def test_targets_play_no_part(world: World) -> None:
    requests = _training_requests(world.dataset, CONFIG, np.random.default_rng(0))
    other = replace(requests, targets=np.roll(requests.targets, 1))
    beliefs = beliefs_of(world.policy(), world.prompts, world.env.trm, requests, CONFIG)
    again = beliefs_of(world.policy(), world.prompts, world.env.trm, other, CONFIG)
    assert np.array_equal(beliefs, again)
    made = [
        [talk.ids for talk in _Writer(world.prompts, world.env, CONFIG, 0).write(rows, beliefs)]
        for rows in (requests, other)
    ]
    assert made[0] == made[1]


def test_preferences_name_their_titles(catalog: Catalog) -> None:
    text = preference_from_titles(catalog, np.array([4, 7]), random.Random(0))
    phrases = text.split(PHRASE_SEPARATOR)
    assert phrases[-2:] == [LIKE + catalog.title(4), LIKE + catalog.title(7)]
    category, decade = phrases[:-2]
    assert category in {*catalog.categories[3], *catalog.categories[6]}
    assert decade == "1990s"


def test_preferences_for_the_recommender_stop_before_what_is_held_out(world: World) -> None:
    dataset = world.dataset
    made = written_preferences(world.policy(), world.prompts, dataset, CONFIG, seed=0)
    lengths = np.diff(dataset.offsets)
    assert len(made) == (lengths - 3).sum()  # neither the first item nor the last two
    assert all(1 <= one.position < lengths[one.user] - 2 for one in made)
    assert all(one.text.count(LIKE) == CONFIG.titles for one in made)


def test_reading_them_teaches_the_protocol(world: World) -> None:
    model = world.policy()
    config = replace(CONFIG, conversations=240, learning_rate=1e-2, tokens_per_batch=1024)
    losses = warm_start(model, world.prompts, world.env, world.dataset, config, seed=0)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert not model.training
    # What the policy most likely writes first is the opening of a preference.
    prompt = world.prompts.build(world.dataset.requests("test"), 0)
    with torch.no_grad():
        best = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    assert world.prompts.tokens.tokenizer.decode([best]) == "The user may want "
