"""Final lists under constrained decoding."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_world import TITLES
from transformers import PreTrainedTokenizerFast

from deeprec.rollout import DistinctTitles, ListLines, TokenText
from deeprec.rollout.constraints import ListState
from deeprec.rollout.protocol import LIST_CLOSE, LIST_OPEN, read_final_list


@pytest.fixture(scope="module", params=["characters", "words"])
def lines(
    request: pytest.FixtureRequest,
    char_tokenizer: PreTrainedTokenizerFast,
    word_tokenizer: PreTrainedTokenizerFast,
) -> ListLines:
    tokenizer = char_tokenizer if request.param == "characters" else word_tokenizer
    return ListLines(TokenText(tokenizer), TITLES)


def walk(state: ListState, choices: random.Random) -> list[int]:
    """Any way through the constraint."""
    ids = []
    while (allowed := state.allowed()) is not None:
        assert list(allowed) == sorted(set(allowed))
        ids.append(choices.choice(allowed))
        state.advance(ids[-1])
    return ids


def titles_of(lines: ListLines, ids: list[int], overrun: str = "") -> list[str]:
    read = read_final_list(LIST_OPEN + overrun + lines._text.decode(ids))
    assert read is not None
    return [line.title for line in read]


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.integers(1, len(TITLES)), unique=True),
    seed=st.integers(0, 2**32),
    overrun=st.sampled_from(["", "\n", "\n1"]),
)
def test_every_way_through_is_a_list_of_distinct_retrieved_titles(
    lines: ListLines, items: list[int], seed: int, overrun: str
) -> None:
    if not items:
        overrun = overrun[:1]
    ids = walk(lines.over(items).open(overrun), random.Random(seed))
    text = overrun + lines._text.decode(ids)
    titles = titles_of(lines, ids, overrun)
    assert len(titles) == len(set(titles)) == min(10, len(items))
    assert {TITLES.index(title) + 1 for title in titles} <= set(items)
    assert text == "".join(f"\n{n}. {t}" for n, t in enumerate(titles, 1)) + f"\n{LIST_CLOSE}"


def test_every_title_can_be_chosen(lines: ListLines) -> None:
    firsts = set()
    for seed in range(300):
        ids = walk(lines.over(range(1, 6)).open(""), random.Random(seed))
        firsts.add(titles_of(lines, ids)[0])
    assert firsts == set(TITLES[:5])  # "Alien", "Alien (1979)" and "Aliens (1986)" among them


def test_a_title_that_begins_another_stays_open_to_both(
    char_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = TokenText(char_tokenizer)
    lines = ListLines(text, TITLES)
    state = lines.over([2, 3, 4]).open("")
    for token in lines.encode("\n1. Alien"):
        assert token in (state.allowed() or ())
        state.advance(token)
    after = {text.decode([token]) for token in state.allowed() or ()}
    assert after == {"s", "\n"}


def test_what_has_no_choice_is_one_id_at_a_time(word_tokenizer: PreTrainedTokenizerFast) -> None:
    lines = ListLines(TokenText(word_tokenizer), TITLES)
    state = lines.over([4, 6]).open("")
    number, heat, big = (lines.encode(text)[0] for text in ("\n1. ", "Heat", "Big"))
    assert state.allowed() == (number,)
    state.advance(number)
    assert state.allowed() == tuple(sorted((heat, big)))
    state.advance(big)
    rest = walk(state, random.Random(0))
    assert lines._text.decode(rest) == f"\n2. Heat\n{LIST_CLOSE}"


@settings(max_examples=60, deadline=None)
@given(titles=st.sets(st.integers(5, 40), min_size=1), named=st.lists(st.integers(0, 100)))
def test_a_preference_names_every_title_once(titles: set[int], named: list[int]) -> None:
    constraint = DistinctTitles("like ", tuple(sorted(titles)))
    left = set(titles)
    for draw in named:
        state = constraint.open("")
        if not left:
            assert state.allowed() is None
            return
        assert state.allowed() == tuple(sorted(left))
        title = sorted(left)[draw % len(left)]
        state.advance(title)
        assert state.allowed() is None
        left.remove(title)


def test_a_word_that_contains_the_trigger_restricts_nothing() -> None:
    assert DistinctTitles("like ", (5, 6)).open("wise").allowed() is None


def test_nothing_retrieved_closes_at_once(lines: ListLines) -> None:
    ids = walk(lines.over([]).open(""), random.Random(0))
    assert lines._text.decode(ids) == f"\n{LIST_CLOSE}"


def test_an_unexpected_overrun_is_followed_by_the_whole_list(lines: ListLines) -> None:
    ids = walk(lines.over([4]).open(" of films"), random.Random(0))
    assert lines._text.decode(ids) == f"\n1. Heat\n{LIST_CLOSE}"


def test_the_space_goes_where_the_tokenizer_puts_it(
    char_tokenizer: PreTrainedTokenizerFast, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert ListLines(TokenText(word_tokenizer), TITLES).number(3) == "\n3. "
    # Characters merge with nothing, so the space may go to either: the number takes it.
    assert ListLines(TokenText(char_tokenizer), TITLES).number(3) == "\n3. "
