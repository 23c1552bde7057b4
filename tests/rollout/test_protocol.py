"""Reading and writing the turn protocol."""

from __future__ import annotations

import pytest

from deeprec.rollout.protocol import (
    DELIMITERS,
    ListedLine,
    clean_preference,
    final_list_text,
    observation_text,
    read_final_list,
    read_preference,
)


def test_delimiters_are_those_of_published_checkpoints() -> None:
    assert DELIMITERS == (
        "<think>",
        "</think>",
        "<|begin_of_preference|>",
        "<|end_of_preference|>",
        "<|begin_of_item_list|>",
        "<|end_of_item_list|>",
        "<recommendation_list>",
        "</recommendation_list>",
    )


def test_observation_has_the_published_form() -> None:
    assert observation_text(["A\n  - categories: x", "B"]) == (
        "\n\n<|begin_of_item_list|>\n1. A\n  - categories: x\n2. B\n<|end_of_item_list|>\n\n"
    )


def test_preference_is_cleaned_for_the_encoder() -> None:
    assert clean_preference(' a "quoted"\n\tfilm ;  b ') == "a quoted film ; b"
    assert clean_preference(' "" \n') == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so <|begin_of_preference|> a; b <|end_of_preference|>\n", "a; b"),
        ("<|begin_of_preference|>x<|begin_of_preference|>y<|end_of_preference|>", "y"),
        ("<|begin_of_preference|><|end_of_preference|>", ""),
        ("a; b<|end_of_preference|>", None),
        ("<|begin_of_preference|>a; b", None),
    ],
)
def test_read_preference(text: str, expected: str | None) -> None:
    assert read_preference(text) == expected


def test_final_list_lines_and_where_they_stand() -> None:
    text = "think</think>" + final_list_text(["Alien", "8. Mile"]) + " bye"
    lines = read_final_list(text)
    assert lines is not None
    assert [line.title for line in lines] == ["Alien", "8. Mile"]
    assert all(text[line.start :].startswith(line.title) for line in lines)


def test_final_list_keeps_unnumbered_lines_whole_and_drops_empty_ones() -> None:
    text = "<recommendation_list>\n\n  Mr. Smith \n2.Big\n3. \n</recommendation_list>"
    assert read_final_list(text) == [ListedLine("Mr. Smith", 25), ListedLine("Big", 38)]


def test_only_a_closed_list_is_a_list() -> None:
    assert read_final_list("<recommendation_list>\n1. Big\n") is None
    assert read_final_list("1. Big</recommendation_list>") is None
    assert read_final_list("<recommendation_list></recommendation_list>") == []


def test_the_last_closed_list_counts() -> None:
    text = final_list_text(["A"]) + final_list_text(["B"]) + "<recommendation_list>\n1. C"
    assert [line.title for line in read_final_list(text) or []] == ["B"]
