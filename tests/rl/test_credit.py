"""Which token answers for which reward."""

from collections.abc import Callable

import numpy as np
import pytest

from deeprec.rl.credit import list_item_credit, sequence_credit

TARGET = 7
# tokens: a preference (0, 1), the tool (2), text (3), then one title a token from 4 on
MASK = [1, 1, 0, 1, 1, 1, 1]


@pytest.fixture
def listing(make_trajectory: Callable, make_rewards: Callable) -> Callable:
    def make(ranked: list[int], *, form: float = 0.0, retrieved: tuple = (5, 6, 7, 8)) -> object:
        gain = 2.0 if TARGET in ranked and form == 0 else 0.0
        made = make_trajectory(response=7, mask=MASK, ranked=ranked, list_positions=[4, 5, 6])
        made.turns[0].retrieved = list(retrieved)
        made.rewards = make_rewards(total=form + gain, format=form, listwise=gain)
        return made

    return make


def gains(trajectory: object) -> list[float]:
    return [
        2.0 if item == TARGET and trajectory.rewards.format == 0 else 0.0  # type: ignore[attr-defined]
        for item in trajectory.ranked  # type: ignore[attr-defined]
    ]


def credit_of(trajectories: list) -> object:
    groups = np.zeros(len(trajectories), dtype=np.int64)
    return list_item_credit(trajectories, [gains(t) for t in trajectories], groups)


def test_sequence_credit_is_the_total_for_every_policy_token(listing: Callable) -> None:
    credit = sequence_credit([listing([7, 5, 6]), listing([5, 6, 8])])
    assert credit.returns.tolist() == [[2.0], [0.0]]
    assert credit.tokens.tolist() == [[6], [6]]
    assert credit.spread(np.array([[1.5], [-1.5]]), 0).tolist() == [1.5] * 6


def test_tokens_are_cut_at_the_titles(listing: Callable) -> None:
    credit = credit_of([listing([7, 5, 6])])
    # the decision to ask, the preference, the tool, the decision to close, titles
    assert credit.segments[0].tolist() == [1, 0, -1, 2, 3, 4, 5]
    assert credit.tokens.tolist() == [[1] * 6]
    spread = credit.spread(np.array([[10.0, 5.0, 6.0, 1.0, 2.0, 3.0]]), 0)
    assert spread.tolist() == [5.0, 10.0, 6.0, 1.0, 2.0, 3.0]


def test_a_title_answers_for_what_follows_it(listing: Callable) -> None:
    first, second, never = listing([7, 5, 6]), listing([5, 7, 6]), listing([5, 6, 8])
    credit = credit_of([first, second, never])
    # position 1: all open, returns to go 2, 2, 0
    np.testing.assert_allclose(credit.returns[:, 3], [2 / 3, 2 / 3, -4 / 3])
    # position 2: settled for the first list, 2 and 0 for the others
    np.testing.assert_allclose(credit.returns[:, 4], [0, 1, -1])
    # position 3: only the last list is still open, so there is nothing to compare it with
    np.testing.assert_allclose(credit.returns[:, 5], [0, 0, 0])
    # the turn was open in all, and the decisions to ask and to close answer for everything
    np.testing.assert_allclose(credit.returns[:, 0], [2 / 3, 2 / 3, -4 / 3])
    assert credit.returns[:, 1:3].T.tolist() == [[2, 2, 0], [2, 2, 0]]


def test_without_what_follows_a_title_answers_for_itself(listing: Callable) -> None:
    lists = [listing([7, 5, 6]), listing([5, 7, 6]), listing([5, 6, 8])]
    credit = list_item_credit(lists, [gains(t) for t in lists], np.zeros(3, dtype=int), 0.0)
    np.testing.assert_allclose(credit.returns[:, 3], [4 / 3, -2 / 3, -2 / 3])
    np.testing.assert_allclose(credit.returns[:, 4], [0, 1, -1])
    discounted = list_item_credit(lists, [gains(t) for t in lists], np.zeros(3, dtype=int), 0.5)
    np.testing.assert_allclose(discounted.returns[:, 3], [1, 0, -1])


def two_turns(listing: Callable, first: list[int], second: list[int], ranked: list[int]) -> object:
    """The tokens of each turn: 0, 1 and 3, 4; then 6 and titles from 7 on."""
    made = listing(ranked)
    turns = (first, second)
    made.response_ids = list(range(10))
    made.policy_mask, made.allowed = [1, 1, 0, 1, 1, 0, 1, 1, 1, 1], [None] * 10
    made.list_positions = [7, 8, 9]
    made.turns = [type(made.turns[0])("war", list(found)) for found in turns]
    return made


def test_a_turn_answers_for_what_it_or_a_later_one_found(listing: Callable) -> None:
    at_once = two_turns(listing, [7, 5], [6, 8], [7, 5, 6])
    later = two_turns(listing, [5, 6], [7, 8], [7, 5, 6])
    never = two_turns(listing, [5, 6], [8, 9], [5, 6, 8])
    credit = credit_of([at_once, later, never])
    assert credit.segments[0].tolist() == [2, 0, -1, 3, 1, -1, 4, 5, 6, 7]
    np.testing.assert_allclose(credit.returns[:, 0], [2 / 3, 2 / 3, -4 / 3])
    # The second turn of the first could not earn what had been found: no signal, no baseline.
    np.testing.assert_allclose(credit.returns[:, 1], [0, 1, -1])


def test_turns_answer_for_the_process_as_well(listing: Callable, make_rewards: Callable) -> None:
    eager, lazy = listing([5, 6, 8]), listing([5, 6, 8])
    eager.rewards = make_rewards(total=1.0, tool_calls=1.0)
    credit = credit_of([eager, lazy])
    assert credit.returns[:, :3].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert (credit.returns[:, 3:] == 0).all()


def test_asking_again_is_compared_with_closing_after_as_many_answers(listing: Callable) -> None:
    once, twice = listing([5, 6, 8]), two_turns(listing, [5, 6], [7, 8], [7, 5, 6])
    credit = credit_of([once, twice])
    assert credit.segments[0].tolist() == [2, 0, -1, 3, 5, 6, 7]  # closes after one answer
    assert credit.segments[1].tolist() == [2, 0, -1, 3, 1, -1, 4, 5, 6, 7]
    assert credit.returns[:, 3].tolist() == [0, 2]


def test_a_list_that_never_had_the_target_is_no_baseline(listing: Callable) -> None:
    hit, miss = listing([7, 5, 6]), listing([5, 6, 8])
    hopeless = [listing([5, 6, 8], retrieved=(5, 6, 8)) for _ in range(6)]
    credit = credit_of([hit, miss, *hopeless])
    np.testing.assert_allclose(credit.returns[:2, 3], [1, -1])
    assert (credit.returns[2:, 3:] == 0).all()


def test_a_broken_format_is_charged_to_the_list_too(listing: Callable) -> None:
    credit = credit_of([listing([5, 6, 8]), listing([7, 7, 7], form=-1.0)])
    assert credit.returns[1].tolist() == [-1] * 6
    assert credit.returns[0].tolist() == [0] * 6


def test_dense_gains_are_never_settled(listing: Callable) -> None:
    lists = [listing([7, 5, 6]), listing([7, 6, 5])]
    credit = list_item_credit(lists, [[2.0, 1.0, 0.5], [2.0, 0.5, 0.5]], np.zeros(2, dtype=int))
    np.testing.assert_allclose(credit.returns[:, 4], [0.25, -0.25])


def test_lists_of_different_lengths_and_none(listing: Callable) -> None:
    empty = listing([])
    empty.list_positions = []
    credit = list_item_credit(
        [listing([5, 7, 6]), empty], [[0.0, 2.0, 0.0], []], np.zeros(2, dtype=int)
    )
    assert credit.tokens.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 4, 0, 0, 0]]


def test_refused(listing: Callable) -> None:
    made = listing([7, 5, 6])
    with pytest.raises(ValueError, match=r"gains\[0\]: expected one per listed title, 3, got 1"):
        list_item_credit([made], [[1.0]], np.zeros(1, dtype=int))
    made.rewards = None
    with pytest.raises(ValueError, match="has no rewards"):
        sequence_credit([made])
