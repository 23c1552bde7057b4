"""The preset ``paper`` against what the authors' code computes, component by component."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from deeprec.rewards import RewardConfig, RewardModel

DATA = Path(__file__).parents[1] / "data"
COMPONENTS = ("format", "tool_calls", "diversity", "listwise", "pointwise", "total")
# Which rule each kind of malformed response was made to break.
EXPECTED_RULE = {
    "short": "list_length",
    "long": "list_length",
    "blankline": "list_length",
    "norec": "list_count",
    "tworec": "list_count",
    "recinthink": "list_in_reasoning",
    "nothinkend": "reasoning_end_count",
    "thinkagain": "reasoning_reopened",
    "prefunclosed": "unbalanced_delimiters",
    "fakelist": "item_list_shape",
    "assistant": "role_word",
    "chinese": "cjk",
    "noreason": "no_closing_reasoning",
    "placeholder": "placeholder",
    "placeholder2": "placeholder",
    "tooltokeninanswer": "tool_word_in_list",
}


@pytest.fixture(scope="module")
def cases():
    with gzip.open(DATA / "rewards.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


@pytest.fixture(scope="module")
def vectors():
    return dict(np.load(DATA / "rewards_embeddings.npz"))


def paper_model(vectors, stage, asked):
    by_text = dict(zip(vectors["preferences"].tolist(), vectors["preference_vectors"], strict=True))

    def encode(preferences):
        asked.append(preferences)
        return np.stack([by_text[preference] for preference in preferences])

    return RewardModel(
        RewardConfig.paper(stage),
        titles=vectors["titles"].tolist(),
        text_vectors=vectors["item_text"],
        item_vectors=vectors["item_collab"],
        encode=encode,
    )


def score(model, cases):
    return model.score_text(
        [case["response"] for case in cases],
        [case["target"] for case in cases],
        [case["n_tool_calls"] for case in cases],
    )


@pytest.mark.parametrize("stage", ["cold", "rec"])
def test_every_component_of_every_response(cases, vectors, stage):
    rewards = score(paper_model(vectors, stage, []), cases)
    assert len(rewards) == 112
    for case, found in zip(cases, rewards, strict=True):
        for name in COMPONENTS:
            expected = case["expected"][stage][name]
            assert getattr(found, name) == pytest.approx(expected, abs=1e-5), (case["kind"], name)


def test_broken_rules_are_named(cases, vectors):
    for case, found in zip(cases, score(paper_model(vectors, "rec", []), cases), strict=True):
        assert bool(found.broken_rules) == (found.format < 0)
        if case["kind"] in EXPECTED_RULE:
            assert EXPECTED_RULE[case["kind"]] in found.broken_rules


def test_encode_gets_the_preferences_of_one_response(cases, vectors):
    asked = []
    score(paper_model(vectors, "cold", asked), cases)
    assert asked == [case["preferences"] for case in cases if len(case["preferences"]) > 1]


def test_encode_is_not_called_when_the_process_is_not_paid(cases, vectors):
    asked = []
    score(paper_model(vectors, "rec", asked), cases)
    assert asked == []


def test_default_counts_no_substring_as_a_hit(cases, vectors):
    model = RewardModel(
        RewardConfig.default("rec"),
        titles=vectors["titles"].tolist(),
        text_vectors=vectors["item_text"],
        item_vectors=vectors["item_collab"],
        encode=lambda preferences: pytest.fail("not paid"),
    )
    by_kind = {}
    for case, found in zip(cases, score(model, cases), strict=True):
        by_kind.setdefault(case["kind"], []).append((case, found))
    for case, found in by_kind["annotated"] + by_kind["hit_sub"] + by_kind["hit"]:
        lines = case["response"].split("<recommendation_list>\n")[1].split("\n")[:10]
        listed = [line.partition(". ")[2] for line in lines]
        rank = listed.index(case["target"]) if case["target"] in listed else None
        if found.broken_rules:
            assert found.broken_rules == ("item_twice",) and len(set(listed)) < 10
        elif rank is None:
            assert found.listwise == 0
        else:
            assert found.listwise == pytest.approx(1 + (10 - rank) * 0.2)
    assert all("item_twice" in found.broken_rules for _, found in by_kind["dup"])
    # "1) Title" is a numbered line as well: its titles are known.
    assert all(found.pointwise != 0 for _, found in by_kind["paren"])
