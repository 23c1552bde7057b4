"""The default rewards on trajectories."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deeprec.rewards import RewardConfig, RewardModel, has_valid_list
from deeprec.rollout.protocol import final_list_text, observation_text
from deeprec.rollout.types import Trajectory, Turn

TITLES = ["Alien", "Aliens", "The Assistant (2019)", "卧虎藏龙", *(f"Film {i}" for i in range(16))]
N = len(TITLES)
RNG = np.random.default_rng(0)
TEXT = RNG.normal(size=(N + 1, 6)).astype(np.float32)
ITEMS = RNG.normal(size=(N + 1, 4)).astype(np.float32)
TEXT[0] = ITEMS[0] = 0
TEN = list(range(1, 11))


def make_trajectory(
    ranked=TEN,
    target=1,
    preferences=("drama", "war"),
    *,
    finish="done",
    reasoning="I rank them.",
    retrieved=TEN,
):
    """A well-formed conversation, unless told otherwise."""
    turns = [Turn(preference, list(retrieved)) for preference in preferences]
    text = "".join(
        f"Let me ask.\n<|begin_of_preference|>{preference}<|end_of_preference|>"
        + observation_text(TITLES[item - 1] for item in retrieved)
        for preference in preferences
    )
    text += f"{reasoning}\n</think>\n"
    text += final_list_text([TITLES[item - 1] if item else "No such film" for item in ranked])
    return Trajectory(
        user=0,
        target=target,
        history=[5],
        prompt_ids=[1],
        turns=turns,
        ranked=list(ranked),
        finish=finish,
        text=text,
    )


def make_model(encode=None, **changes):
    config = RewardConfig.default("rec", **{"process": True, **changes})
    return RewardModel(
        config,
        titles=TITLES,
        text_vectors=TEXT,
        item_vectors=torch.from_numpy(ITEMS),
        encode=encode or (lambda texts: torch.eye(len(texts))),
    )


def score_one(trajectory, **changes):
    (rewards,) = make_model(**changes).score([trajectory])
    return rewards


def test_a_well_formed_hit():
    found = score_one(make_trajectory())
    assert found.broken_rules == ()
    assert (found.format, found.tool_calls, found.diversity) == (0.0, 0.5, 0.2)
    assert found.listwise == pytest.approx(3.0)
    parts = (found.tool_calls, found.diversity, found.listwise, found.pointwise)
    assert found.total == pytest.approx(sum(parts))


@pytest.mark.parametrize(("calls", "paid"), [(1, 0.0), (2, 0.5), (3, 1.0), (6, 1.0)])
def test_tool_calls_are_paid_from_the_second_to_the_third(calls, paid):
    found = score_one(make_trajectory(preferences=[f"wish {i}" for i in range(calls)]))
    assert found.tool_calls == pytest.approx(paid)


def test_pointwise_is_the_weighted_similarity_to_the_target():
    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    ranked = [7, 0, *range(9, 17)]
    similarity = [(TEXT[i] @ TEXT[3] + cosine(ITEMS[i], ITEMS[3])) / 2 if i else 0 for i in ranked]
    weights = [(1 - i / 10) ** 2 for i in range(10)]
    expected = 10 * np.dot(similarity, weights) / sum(weights)
    assert score_one(make_trajectory(ranked, target=3)).pointwise == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"finish": "no_list", "ranked": []}, "no_list"),
        ({"finish": "empty_preference"}, "empty_preference"),
        ({"finish": "too_many_calls"}, "too_many_calls"),
        ({"finish": "too_long"}, "too_long"),
        ({"ranked": TEN[:9]}, "list_length"),
        ({"ranked": [*TEN[:9], 1]}, "item_twice"),
        ({"preferences": ()}, "no_tool_call"),
        ({"reasoning": ""}, "no_closing_reasoning"),
        ({"reasoning": "As an assistant, done."}, "role_word"),
        ({"reasoning": "排序"}, "cjk"),
        ({"reasoning": "[recalled item 1]"}, "placeholder"),
        ({"reasoning": "<think>again"}, "reasoning_reopened"),
        ({"reasoning": "</think> more"}, "reasoning_end_count"),
        ({"reasoning": "<recommendation_list></recommendation_list>"}, "list_in_reasoning"),
        ({"reasoning": "<recommendation_list></recommendation_list>"}, "list_count"),
        ({"reasoning": "<|begin_of_preference|>x"}, "unanswered_preference"),
        (
            {"reasoning": "<|begin_of_item_list|>\n1. A\n<|end_of_item_list|>\n"},
            "forged_item_list",
        ),
    ],
)
def test_broken_rules(changes, rule):
    found = score_one(make_trajectory(**changes))
    assert rule in found.broken_rules
    assert (found.format, found.listwise, found.pointwise) == (-1.0, 0.0, 0.0)


def test_process_is_paid_even_when_the_format_is_broken():
    found = score_one(make_trajectory(TEN[:9]))
    assert (found.tool_calls, found.diversity) == (0.5, 0.2)
    assert found.total == pytest.approx(-0.3)


def test_titles_in_lists_break_no_rule_of_the_policys_own_words():
    # "The Assistant (2019)" and a Chinese title are retrieved and listed.
    assert score_one(make_trajectory(TEN, target=3)).broken_rules == ()


def test_a_hit_is_the_item_itself():
    assert score_one(make_trajectory([2, *range(5, 14)], target=1)).listwise == 0
    substring = score_one(make_trajectory([2, *range(5, 14)], target=1), match="substring")
    assert substring.listwise == pytest.approx(3.0)


def test_an_unknown_title_earns_nothing():
    known = score_one(make_trajectory([1, *range(5, 14)]))
    unknown = score_one(make_trajectory([0, *range(5, 14)]))
    assert unknown.broken_rules == () and unknown.listwise == 0
    assert unknown.pointwise < known.pointwise


def test_repeating_the_target_does_not_pay():
    for config in ({}, {"distinct": False}):
        gains = make_model(**config).list_item_rewards(make_trajectory([1] * 10))
        assert sum(gain > 0 for gain in gains) <= 1


def test_preferences_are_encoded_in_one_call():
    asked = []

    def encode(texts):
        asked.append(texts)
        return np.array([[1.0, 0.0] if text == "drama" else [1.0, 1.0] for text in texts])

    conversations = [("drama", " war "), ("drama",), ("drama", "drama"), ("war", "drama", "war")]
    rewards = make_model(encode).score([make_trajectory(preferences=p) for p in conversations])
    assert asked == [["drama", "war", "drama", "drama", "war", "drama", "war"]]
    cosine = 1 / np.sqrt(2)
    expected = [0.2 * (1 - cosine), 0.0, 0.0, 0.2 * (1 - (1 + 2 * cosine) / 3)]
    assert [r.diversity for r in rewards] == pytest.approx(expected, abs=1e-6)


def test_no_trajectories():
    assert make_model().score([]) == []


class EncoderDown(RuntimeError):
    pass


def test_a_failing_encoder_is_not_a_reward_of_zero():
    def fail(texts):
        raise EncoderDown

    with pytest.raises(EncoderDown):
        make_model(fail).score([make_trajectory()])


@pytest.mark.parametrize(
    "vectors", [np.zeros(2), np.zeros((3, 4)), np.full((2, 4), np.nan), np.full((2, 4), np.inf)]
)
def test_bad_encodings_raise(vectors):
    with pytest.raises(ValueError, match="encode"):
        make_model(lambda texts: vectors).score([make_trajectory()])


@pytest.mark.parametrize("changes", [{"target": 0}, {"target": N + 1}, {"ranked": [*TEN[:9], 99]}])
def test_items_outside_the_catalogue_raise(changes):
    trajectory = replace(make_trajectory(), **changes)
    with pytest.raises(ValueError, match=r"trajectory\.(target|ranked)"):
        make_model().score([trajectory])


def test_unknown_target_title_raises():
    with pytest.raises(ValueError, match="none of the titles"):
        make_model().score_text(["text"], ["Unheard of"], [1])
    with pytest.raises(ValueError, match="equally long"):
        make_model().score_text(["text"], [], [1])


@pytest.mark.parametrize("changes", [{"text_vectors": TEXT[1:]}, {"item_vectors": ITEMS * np.nan}])
def test_bad_vectors_raise(changes):
    vectors = {"text_vectors": TEXT, "item_vectors": ITEMS, **changes}
    with pytest.raises(ValueError, match=next(iter(changes))):
        RewardModel(RewardConfig(), titles=TITLES, encode=lambda texts: texts, **vectors)


@pytest.mark.parametrize(
    "changes", [{"listwise": "map"}, {"match": "fuzzy"}, {"list_size": 0}, {"max_paid_calls": 0}]
)
def test_bad_configuration_raises(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        RewardConfig(**changes)
    with pytest.raises(ValueError, match="stage"):
        RewardConfig.default("hot")


rankings = st.lists(st.integers(0, N), min_size=0, max_size=12)


@given(rankings, st.integers(1, N), st.sampled_from(["hit", "ndcg"]))
def test_item_rewards_sum_to_the_listwise_reward(ranked, target, listwise):
    model = make_model(listwise=listwise)
    trajectory = make_trajectory(ranked, target)
    gains = model.list_item_rewards(trajectory)
    (rewards,) = model.score([trajectory])
    assert len(gains) == len(ranked)
    assert sum(gains) == pytest.approx(rewards.listwise)
    assert all(gain == 0 or item == target for gain, item in zip(gains, ranked, strict=True))
    assert (rewards.format == 0) == (rewards.broken_rules == ())
    assert has_valid_list(trajectory) == (rewards.format == 0)


@pytest.mark.parametrize("listwise", ["hit", "ndcg"])
def test_a_higher_rank_earns_more(listwise):
    others = list(range(2, 12))
    gains = [
        score_one(make_trajectory([*others[:i], 1, *others[i:9]]), listwise=listwise).listwise
        for i in range(10)
    ]
    assert gains[0] == pytest.approx(3.0)
    assert all(above > below > 0 for above, below in pairwise(gains))


@given(st.permutations(["drama", "war", "noir", "heist"]), st.integers(0, 4))
def test_a_written_conversation_scores_the_same_as_text(preferences, n):
    listed = list(range(5, 15))
    trajectory = make_trajectory(listed, 8, tuple(preferences[:n]), retrieved=listed)
    model = make_model()
    (from_trajectory,) = model.score([trajectory])
    (from_text,) = model.score_text([trajectory.text], [TITLES[7]], [n])
    assert replace(from_trajectory, broken_rules=()) == replace(from_text, broken_rules=())


def test_numbered_titles_in_text():
    model = RewardModel(
        RewardConfig(list_size=2),
        titles=["9. april (2015)", "Other"],
        text_vectors=np.ones((3, 2)),
        item_vectors=np.ones((3, 2)),
        encode=lambda texts: texts,
    )
    for line in ("9. april (2015)", "1. 9. april (2015)", "2) 9. april (2015)"):
        conversation = make_trajectory([], preferences=("x",), retrieved=[1, 2]).text
        text = conversation.split("<recommendation_list>")[0]
        text += f"<recommendation_list>\n{line}\nOther\n</recommendation_list>"
        (found,) = model.score_text([text], ["9. april (2015)"], [1])
        assert found.listwise == pytest.approx(1.4), found
