"""The tool: what it is asked, what it answers, what it leaves out."""

from __future__ import annotations

import pytest
import torch
from tiny_world import TITLES, FakeEncoder, FakeTRM, make_requests

from deeprec.data import Catalog
from deeprec.rollout import EnvironmentOptions, RetrievalEnvironment, ToolCall
from deeprec.rollout.protocol import observation_text


def make_env(catalog: Catalog, **arguments: object) -> RetrievalEnvironment:
    return RetrievalEnvironment(FakeTRM(), catalog, FakeEncoder(), **arguments)  # type: ignore[arg-type]


def test_all_calls_are_answered_by_one_pass(catalog: Catalog) -> None:
    env = make_env(catalog, k=5)
    requests = make_requests(4)
    calls = [ToolCall(row, 0, "x" * length) for row, length in ((0, 1), (3, 7), (0, 2))]
    answers = env.observe(requests, calls)
    assert len(env.trm.calls) == 1
    assert env.trm.calls[0].tolist() == [[1, 1], [7, 1], [2, 1]]
    for call, answer in zip(calls, answers, strict=True):
        history = set(requests.history[call.row].tolist())
        expected = [(i + len(call.preference)) % 16 + 1 for i in range(16)]
        assert answer.items == [item for item in expected if item not in history][:5]
    assert env.observe(requests, []) == []


def test_preferences_are_cleaned_before_they_are_encoded(catalog: Catalog) -> None:
    env = make_env(catalog)
    env.observe(make_requests(1), [ToolCall(0, 0, ' "a"\n b ')])
    assert env.trm.calls[0].tolist() == [[3, 2]]


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("retrieved", [True, False])
def test_what_is_excluded_is_an_option(catalog: Catalog, history: bool, retrieved: bool) -> None:
    options = EnvironmentOptions(exclude_history=history, exclude_retrieved=retrieved)
    env = make_env(catalog, k=16, options=options)
    requests = make_requests(2)
    calls = [ToolCall(0, 1, "a", [5, 6, 7]), ToolCall(1, 0, "b")]
    for call, answer in zip(calls, env.observe(requests, calls), strict=True):
        gone = set(requests.history[call.row]) - {0} if history else set()
        gone |= set(call.retrieved) if retrieved else set()
        assert set(answer.items) == set(range(1, 17)) - gone


def test_fewer_items_than_asked_are_no_error(catalog: Catalog) -> None:
    env = make_env(catalog)
    (answer,) = env.observe(make_requests(1), [ToolCall(0, 1, "a", list(range(1, 17)))])
    assert answer.items == []
    assert answer.text == observation_text([])


def test_item_lists_show_categories_or_not(catalog: Catalog) -> None:
    requests = make_requests(1)
    with_categories, without = (
        make_env(catalog, options=EnvironmentOptions(show_categories=show)).observe(
            requests, [ToolCall(0, 0, "a")]
        )[0]
        for show in (True, False)
    )
    assert with_categories.items == without.items
    assert with_categories.text == observation_text([catalog.text(i) for i in without.items])
    assert without.text == observation_text([TITLES[i - 1] for i in without.items])
    assert "categories: Old, New" in with_categories.text


def test_preferences_can_be_overridden(catalog: Catalog) -> None:
    seen = []

    def override(row: int, turn: int, preference: str) -> str | None:
        seen.append((row, turn, preference))
        return {"empty": "", "other": "abc"}.get(preference)

    env = make_env(catalog, preference_override=override)
    calls = [ToolCall(0, 0, "empty"), ToolCall(1, 2, "other"), ToolCall(0, 1, "same")]
    env.observe(make_requests(2), calls)
    assert seen == [(0, 0, "empty"), (1, 2, "other"), (0, 1, "same")]
    # No preference is a vector of zeros.
    assert env.trm.calls[0].equal(torch.tensor([[0.0, 0], [3, 1], [4, 1]]))


def test_the_last_answer_may_close_the_conversation(catalog: Catalog) -> None:
    options = EnvironmentOptions(closing="</think>")
    env = make_env(catalog, max_calls=2, options=options)
    first, last = env.observe(make_requests(1), [ToolCall(0, 0, "a"), ToolCall(0, 1, "a")])
    assert last.text == first.text + "</think>"


def test_impossible_numbers_are_refused(catalog: Catalog) -> None:
    with pytest.raises(ValueError, match="max_calls"):
        make_env(catalog, max_calls=0)
