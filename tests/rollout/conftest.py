"""Tokenizers, models and catalogue of the tiny world."""

from __future__ import annotations

import pytest
from tiny_world import TITLES, WORDS, make_model
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deeprec.data import Catalog
from deeprec.rollout import protocol


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    return Catalog(
        titles=TITLES,
        categories=tuple(("Old", "New") if i % 2 else () for i in range(len(TITLES))),
        keys=tuple(str(i) for i in range(len(TITLES))),
    )


@pytest.fixture(scope="session")
def char_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: every delimiter and title spans many tokens."""
    characters = sorted({*map(chr, range(32, 127)), "\n"})
    vocabulary = {"<eos>": 0, **{c: i for i, c in enumerate(characters, 1)}}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="session")
def word_tokenizer(char_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """One token a title, a delimiter, a list number, a word; characters for the rest."""
    tokenizer = Tokenizer.from_str(char_tokenizer.backend_tokenizer.to_str())
    numbers = [f"\n{n}. " for n in range(1, 51)]
    words = [*protocol.DELIMITERS, *WORDS, *numbers, *TITLES]
    tokenizer.add_tokens([AddedToken(w, normalized=False, special=False) for w in words])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="session", params=["qwen2", "llama"])
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)
