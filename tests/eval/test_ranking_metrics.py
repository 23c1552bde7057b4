"""Metrics of ranked lists and of conversations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeprec.eval import METRICS, UserMetrics, evaluate_ranking, evaluate_trajectories
from deeprec.rollout.types import Trajectory, Turn

TEN = list(range(1, 11))


def expected(ranked, target):
    """The definitions, one user at a time."""
    rank = ranked[:10].index(target) if target in ranked[:10] else 10
    values = {f"recall@{k}": float(rank < k) for k in (1, 5, 10)}
    values |= {f"ndcg@{k}": 1 / math.log2(rank + 2) if rank < k else 0.0 for k in (5, 10)}
    return values


def trajectory(user, ranked, finish="done", turns=2):
    return Trajectory(
        user=user,
        target=1,
        history=[9],
        prompt_ids=[0],
        ranked=ranked,
        finish=finish,
        turns=[Turn("drama", [1, 2])] * turns,
    )


@given(st.lists(st.tuples(st.lists(st.integers(0, 15), max_size=14), st.integers(1, 15))))
def test_against_the_definitions(cases):
    found = evaluate_ranking([ranked for ranked, _ in cases], [target for _, target in cases])
    assert tuple(found.values) == METRICS and len(found) == len(cases)
    for user, (ranked, target) in enumerate(cases):
        for name, value in expected(ranked, target).items():
            assert found.values[name][user] == pytest.approx(value), name
        assert found.values["valid_rate"][user] == float(bool(ranked))


def test_arrays_and_lists_give_the_same():
    ranked = np.random.default_rng(0).integers(1, 20, size=(50, 10))
    targets = np.arange(1, 51) % 19 + 1
    from_array = evaluate_ranking(ranked, targets)
    from_lists = evaluate_ranking(ranked.tolist(), targets.tolist())
    for name in METRICS:
        np.testing.assert_array_equal(from_array.values[name], from_lists.values[name])


def test_a_repeated_target_counts_once():
    found = evaluate_ranking([[3, 7, 7, 7]], [7])
    assert found.values["recall@10"][0] == 1
    assert found.values["ndcg@10"][0] == pytest.approx(1 / math.log2(3))


def test_an_invalid_list_is_a_miss():
    found = evaluate_ranking([TEN, TEN], [1, 1], valid=[True, False])
    assert found.values["recall@1"].tolist() == [1.0, 0.0]
    assert found.values["valid_rate"].tolist() == [1.0, 0.0]


def test_conversations():
    found = evaluate_trajectories(
        [
            trajectory(4, TEN),
            trajectory(2, TEN, finish="too_long"),
            trajectory(7, TEN[:9]),
            trajectory(5, [*TEN[:9], 1]),
            trajectory(6, [2, 0, 1, *range(11, 18)], turns=1),
        ]
    )
    assert found.users.tolist() == [4, 2, 7, 5, 6]
    assert found.values["recall@5"].tolist() == [1, 0, 0, 0, 1]
    assert found.values["valid_rate"].tolist() == [1, 0, 0, 0, 1]
    assert found.values["mean_turns"].tolist() == [2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1]], [1, 2]), "1 lists, targets 2"),
        (([[1]], [0]), "targets must be items"),
    ],
)
def test_bad_input_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_ranking(*arguments)


def test_users_are_distinct_and_fit():
    with pytest.raises(ValueError, match="distinct"):
        evaluate_ranking([[1], [1]], [1, 1], users=[3, 3])
    with pytest.raises(ValueError, match="shape"):
        UserMetrics(np.arange(3), {"ndcg@10": np.zeros(2)})
