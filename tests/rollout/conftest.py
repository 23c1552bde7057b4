"""A tiny world: character tokens, a few titles, tiny random models, a fake recommender."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from deeprec.data import Catalog, Requests
from deeprec.rollout import protocol

TITLES = (
    "Alien (1979)",
    "Aliens (1986)",
    "Alien",
    "Heat",
    "Heat 2",
    "Big",
    "Up",
    "Jaws",
    "Brazil",
    "Fargo",
    "Rope",
    "Ran",
    "Gilda",
    "Kes",
    "Once",
    "Amour",
)
WORDS = ("like ", "old", "new", "; ", "\n", "Search.", "Done.", "User:", protocol.PROMPT_END)


class FakeTRM(nn.Module):
    """Returns the lowest item ids that are not excluded, shifted by the preference's first number."""

    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.n_items = n_items
        self.anchor = nn.Parameter(torch.zeros(()))
        self.calls: list[int] = []
        self.preferences: list[Tensor] = []

    def retrieve(self, history, lengths, preference, k, *, exclude=None):
        self.calls.append(len(history))
        self.preferences.append(preference)
        rows = []
        for row in range(len(history)):
            start, stop = exclude.offsets[row], exclude.offsets[row + 1]
            seen = set(exclude.ids[start:stop].tolist())
            shift = int(preference[row, 0])
            order = [(item + shift - 1) % self.n_items + 1 for item in range(1, self.n_items + 1)]
            found = [item for item in order if item not in seen][:k]
            rows.append(found + [-1] * (k - len(found)))
        return type("TopK", (), {"indices": torch.tensor(rows)})()


class FakeEncoder:
    """Encodes a text as its length and its number of words."""

    dim = 2

    def encode(self, texts: list[str], *, query: bool = False) -> Tensor:
        assert query
        return torch.tensor([[float(len(text)), float(len(text.split()))] for text in texts])


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


def make_model(family: str = "qwen2", vocab_size: int = 256, seed: int = 0) -> PreTrainedModel:
    """Two layers, four query heads on two key heads, weights large enough to be opinionated."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model.eval()


def make_requests(n: int, length: int = 4, n_items: int = len(TITLES)) -> Requests:
    """``n`` users with histories of different lengths."""
    generator = np.random.default_rng(1)
    history = generator.integers(1, n_items + 1, (n, length))
    lengths = generator.integers(1, length + 1, n)
    history[np.arange(length) >= lengths[:, None]] = 0
    return Requests(
        users=np.arange(10, 10 + n),
        history=history,
        lengths=lengths,
        targets=generator.integers(1, n_items + 1, n),
        timestamps=np.full(n, 1_400_000_000),
        history_timestamps=np.where(history > 0, 1_300_000_000, 0),
    )
