"""The catalogue's tokenizer: nothing is lost, and what the method needs is one token."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deeprec.data import Catalog
from deeprec.policy.tokenizer import (
    LONGEST_LIST,
    PHRASES,
    build_title_tokenizer,
    number_token,
    week_token,
)
from deeprec.rollout import protocol

TITLES = (
    "Alien",
    "Alien 3",
    "Aliens (1986)",
    "Amélie (2001)",
    "千と千尋 (2001)",
    "1",
    "Up  ",
    "a\nb",
)
FIRST, LAST = 1_388_000_000, 1_420_100_000  # across two turns of the year
DAY = 24 * 3600


def build() -> PreTrainedTokenizerFast:
    catalog = Catalog(
        titles=TITLES,
        categories=tuple(("Sci-Fi", "Horror") for _ in TITLES),
        keys=tuple(str(i) for i in range(len(TITLES))),
    )
    return build_title_tokenizer(catalog, FIRST, LAST)


TOKENIZER = build()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TITLES)
def test_a_title_is_one_token_also_beside_other_text(text: str) -> None:
    (token,) = encode(text)
    assert TOKENIZER.decode([token]) == text
    assert token in encode(f"{number_token(3)}{text}\n")


def test_the_longest_title_wins_where_one_is_the_beginning_of_another() -> None:
    assert encode("Alien 3") != encode("Alien") + encode(" 3")
    assert encode("Alien 2")[0] == encode("Alien")[0]
    assert TOKENIZER.decode(encode("Alien 2")) == "Alien 2"


@pytest.mark.parametrize(
    "text",
    (
        *protocol.DELIMITERS,
        *PHRASES,
        *("Horror", "2001", "2000s", "1980s"),
        *(number_token(n) for n in (1, LONGEST_LIST)),
    ),
)
def test_words_of_the_protocol_are_one_token(text: str) -> None:
    assert len(encode(text)) == 1


def test_every_week_in_between_is_one_token() -> None:
    for moment in (*range(FIRST, LAST, DAY), LAST):
        assert len(encode(week_token(moment))) == 1
    assert week_token(1_419_811_200) == "\n2015-W01: "  # 29 December 2014


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(st.sampled_from((*TITLES, *PHRASES, "x", " "))).map("".join))
def test_decoding_gives_back_what_was_encoded(text: str) -> None:
    assert TOKENIZER.decode(encode(text)) == text


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = f"{protocol.THINK_OPEN}Alien 3; Amélie (2001)\n{week_token(FIRST)}ß"
    assert again.encode(text, add_special_tokens=False) == encode(text)
    assert again.decode(encode(text)) == text
    assert len(again) == len(TOKENIZER) and again.pad_token_id == TOKENIZER.pad_token_id
