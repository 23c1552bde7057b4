"""A tiny world: a few titles, tiny random models, a fake recommender and a scripted policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from deeprec.data import Requests
from deeprec.rollout import Request, Sample, SamplingConfig, TokenText, protocol

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
    """Returns items in the order of their ids, starting after the preference's first number."""

    def __init__(self, n_items: int = len(TITLES)) -> None:
        super().__init__()
        self.n_items = n_items
        self.anchor = nn.Parameter(torch.zeros(()))
        self.calls: list[Tensor] = []

    def retrieve(
        self,
        history: Tensor,
        lengths: Tensor,
        preference: Tensor,
        k: int,
        *,
        exclude: Any,
        exclude_history: bool,
        cache: Any,
    ) -> Any:
        self.calls.append(preference)
        rows = []
        for row in range(len(history)):
            seen = set(history[row].tolist()) if exclude_history else set()
            if exclude is not None:
                seen |= set(exclude.ids[exclude.offsets[row] : exclude.offsets[row + 1]].tolist())
            shift = int(preference[row, 0])
            order = [(item + shift) % self.n_items + 1 for item in range(self.n_items)]
            found = [item for item in order if item not in seen][:k]
            rows.append(found + [-1] * (k - len(found)))
        return type("TopK", (), {"indices": torch.tensor(rows)})()


class FakeEncoder:
    """Encodes a text as its length and its number of words."""

    dim = 2

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Tensor:
        assert query
        return torch.tensor([[float(len(text)), float(len(text.split()))] for text in texts])


class PlainPrompt:
    """The titles of the history, then the prompt's end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def build(self, requests: Requests, row: int) -> list[int]:
        titles = [TITLES[item - 1] for item in requests.history[row, : requests.lengths[row]]]
        text = f"User:{'; '.join(titles)}{protocol.PROMPT_END}"
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


class ScriptedEngine:
    """Writes given texts: ``script(conversation, turn)``; an end-of-text marker is ``<eos>``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: Any) -> None:
        self.tokenizer = tokenizer
        self.text = TokenText(tokenizer)
        self.sampling = SamplingConfig()
        self.script = script
        self.turns: dict[Any, int] = {}
        self.requests: list[Request] = []
        self.released: list[Any] = []
        self._queue: list[Request] = []

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        self._queue.append(request)

    def step(self) -> list[Sample]:
        # Not in order, and not all at once: a roll-out must not rely on either.
        batch, self._queue = self._queue[::-2], self._queue[::-1][1::2][::-1]
        return [self._answer(request) for request in batch]

    def _answer(self, request: Request) -> Sample:
        turn = self.turns.get(request.conversation, 0)
        self.turns[request.conversation] = turn + 1
        text = self.script(request.conversation, turn)
        (ids,) = self.text.encode([text])
        stops = [stop for stop in request.stop if text.endswith(stop)]
        finish = "eos" if text.endswith("<eos>") else "stop" if stops else "length"
        stop = stops[0] if stops else None
        return Sample(request.conversation, ids, [-1.0] * len(ids), [None] * len(ids), finish, stop)

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        return [self._answer(request) for request in requests]

    def release(self, conversation: Any) -> None:
        self.released.append(conversation)

    def restart(self) -> None:
        self._queue.clear()
        self.turns.clear()

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass

    def sync_weights(self) -> None:
        pass


def make_model(family: str = "qwen2", vocab_size: int = 200, seed: int = 0) -> PreTrainedModel:
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
    model.generation_config.eos_token_id = None
    return model.eval()


def reference_logprobs(
    model: PreTrainedModel,
    prompt: list[int],
    response: list[int],
    allowed: Sequence[tuple[int, ...] | None],
    temperature: float = 1.0,
) -> Tensor:
    """Log-probs [n] of a response by one full forward pass, as a trainer computes them."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].float() / temperature
    rows = logits[len(prompt) - 1 : -1]
    for row, ids in zip(rows, allowed, strict=True):
        if ids is not None:
            kept = row[list(ids)].clone()
            row.fill_(-torch.inf)
            row[list(ids)] = kept
    return rows.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


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
