"""Tokens, characters and stop strings."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from deeprec.rollout.token_text import StopTable, TokenText


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    """Words whose text is joined without anything between."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: characters beyond ASCII are spread over several."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """A decoder that puts spaces between words."""
    words = ["<unk>", "ask", "stop", "now", "here"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [byte_tokenizer, spaced_tokenizer])
def test_decoding_is_the_tokenizers(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    text = TokenText(tokenizer)
    ids = [*range(1, 5), 2, 1] if make is spaced_tokenizer else tokenizer("Amélie 映画").input_ids
    assert text.decode(ids) == tokenizer.decode(ids)


def test_characters_belong_to_the_token_they_begin_in() -> None:
    tokenizer = byte_tokenizer()
    text = TokenText(tokenizer)
    ids = tokenizer("éa映b").input_ids
    assert text.token_at(ids, range(4)) == [0, 2, 3, 6]


def test_characters_of_a_decoder_with_spaces() -> None:
    text = TokenText(spaced_tokenizer())
    assert text.decode([1, 3, 2]) == "ask now stop"
    assert text.token_at([1, 3, 2], [0, 4, 8]) == [0, 1, 2]


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    text = TokenText(tokenizer_of(["a", "b"]), vocabulary=8)
    assert text.decode([0, 7, 1]) == "ab"


def test_a_stop_string_may_begin_and_end_inside_tokens() -> None:
    words = ["?", "x<", "end", ">y", "<end>", "a<end>b", "<", ">"]
    table = StopTable(["<end>"], TokenText(tokenizer_of(words)))
    assert table.completed([1, 2, 3]) == ("<end>", "y")
    assert table.completed([4]) == ("<end>", "")
    assert table.completed([5]) == ("<end>", "b")
    assert table.completed([1, 2, 7]) == ("<end>", "")
    assert table.completed([6, 2, 2, 7]) is None
    assert table.completed([1, 2]) is None
    assert [words[i] for i in table.suspects.nonzero()[0]] == [">y", "<end>", "a<end>b", ">"]


def test_a_stop_string_counts_where_it_is_completed_only() -> None:
    words = ["?", "<end>", ">"]
    table = StopTable(["<end>"], TokenText(tokenizer_of(words)))
    assert table.completed([1, 2]) is None


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopTable([""], TokenText(tokenizer_of(["a"])))
