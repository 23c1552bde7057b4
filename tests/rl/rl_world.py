"""Hand-made trajectories, a tiny policy, and a small world to train it in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from deeprec.data import Catalog, Requests
from deeprec.policy import tokenizer as tokens
from deeprec.policy.prompts import TitlePrompt, TitleTokens
from deeprec.rewards import Rewards
from deeprec.rollout import (
    EnvironmentOptions,
    RetrievalEnvironment,
    Sample,
    SamplingConfig,
    ToolCall,
    Trajectory,
    TransformersEngine,
    Turn,
    protocol,
)

VOCABULARY = 40


def tiny_policy(seed: int = 0, **changes: object) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return Qwen2ForCausalLM(Qwen2Config(**{**settings, **changes}))


def make_rewards(total: float = 0.0, **parts: float) -> Rewards:
    zero = dict.fromkeys(("format", "tool_calls", "diversity", "listwise", "pointwise"), 0.0)
    return Rewards(**{**zero, **parts}, total=total)


def make_trajectory(
    *,
    prompt: int = 3,
    response: int = 6,
    mask: list[int] | None = None,
    allowed: list[tuple[int, ...] | None] | None = None,
    seed: int = 0,
    **fields: object,
) -> Trajectory:
    """Random tokens; everything else unconstrained and sampled unless given."""
    rng = np.random.default_rng(seed)
    mask = mask or [1] * response
    allowed = allowed or [None] * response
    ids = rng.integers(2, VOCABULARY, response).tolist()
    ids = [
        choices[0] if choices and token not in choices else token
        for token, choices in zip(ids, allowed, strict=True)
    ]
    made = Trajectory(
        user=0,
        target=7,
        history=[1, 2],
        prompt_ids=rng.integers(2, VOCABULARY, prompt).tolist(),
        response_ids=ids,
        policy_mask=mask,
        logprobs=[-1.0 if m else 0.0 for m in mask],
        allowed=allowed,
        turns=[Turn("war", [5, 6, 7, 8])],
        finish="done",
        rewards=make_rewards(),
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


CATEGORIES = ("War", "Drama", "Comedy", "Horror", "Western", "Crime", "Sport", "Music")
NOW = 1_400_000_000  # all requests fall into one week: dates play no part here
TARGET_SLOT = 6  # where the fake recommender puts a user's target, from 0


class FakeEncoder:
    """Which categories a text names."""

    dim = len(CATEGORIES)

    def encode(self, texts: list[str], *, query: bool = False) -> Tensor:
        return torch.tensor([[float(name in text) for name in CATEGORIES] for text in texts])


class FakeTRM(nn.Module):
    """Retrieves items at random by history and preference, the target always in one slot."""

    def __init__(self, n_items: int, targets: dict[tuple[int, ...], int]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))  # says where the model is
        self.n_items, self.targets = n_items, targets

    def retrieve(
        self,
        history: Tensor,
        lengths: Tensor,
        preference: Tensor,
        k: int,
        *,
        exclude: Any,
        exclude_history: bool = False,
        cache: Any = None,
    ) -> SimpleNamespace:
        found = []
        for row, (items, wish) in enumerate(
            zip(history.tolist(), preference.int().tolist(), strict=True)
        ):
            start, stop = exclude.offsets[row], exclude.offsets[row + 1]
            seen = set(exclude.ids[start:stop].tolist())
            seen |= set(items) if exclude_history else set()
            target = self.targets[tuple(items)]
            order = np.random.default_rng([*items, *wish]).permutation(self.n_items) + 1
            ranked = [int(item) for item in order if item not in seen and item != target][:k]
            if target not in seen:
                ranked = [*ranked[:TARGET_SLOT], target, *ranked[TARGET_SLOT:]][:k]
            found.append(ranked)
        return SimpleNamespace(indices=torch.tensor(found))


@dataclass
class ToyRewards:
    """``pay`` maps a trajectory to the reward of each listed title, or of the whole."""

    pay: Callable[[Trajectory], list[float]]

    def score(self, trajectories: Sequence[Trajectory]) -> list[Rewards]:
        scored = []
        for made in trajectories:
            form = 0.0 if made.finish == "done" and len(made.ranked) == 10 else -1.0
            gain = sum(self.pay(made)) if form == 0 else 0.0
            broken = () if form == 0 else ("no_list",)
            scored.append(Rewards(form, 0.0, 0.0, gain, 0.0, form + gain, broken))
        return scored

    def list_item_rewards(self, made: Trajectory) -> list[float]:
        return self.pay(made) if made.finish == "done" else [0.0] * len(made.ranked)


@dataclass
class World:
    """A random catalogue, users, a recommender that knows them, and a policy to train."""

    env: RetrievalEnvironment
    engine: TransformersEngine
    policy: Qwen2ForCausalLM
    requests: Requests

    def conversations(self, rows: NDArray[np.int64], rng: np.random.Generator) -> list[Trajectory]:
        """One call with two random wishes each, then ten of the found titles in random order."""
        build = self.env.prompts.build  # type: ignore[union-attr]
        wishes = [
            tokens.PHRASE_SEPARATOR.join(rng.choice(CATEGORIES, 2, replace=False)) for _ in rows
        ]
        calls = [ToolCall(int(row), 0, wish) for row, wish in zip(rows, wishes, strict=True)]
        made = []
        for row, wish, found in zip(
            rows, wishes, self.env.observe(self.requests, calls), strict=True
        ):
            asks = f"{tokens.ASK}{protocol.PREFERENCE_OPEN}{wish}{protocol.PREFERENCE_CLOSE}"
            titles = [self.env.catalog.title(item) for item in rng.permutation(found.items)[:10]]
            ends = f"{tokens.RANK}\n{protocol.THINK_CLOSE}\n{protocol.final_list_text(titles)}"
            asked, told, listed = self.engine.text.encode([asks, found.text, ends])
            talk = Trajectory(0, 0, [], prompt_ids=build(self.requests, int(row)))
            talk.append_sample(Sample(0, asked, [0.0] * len(asked), [None] * len(asked), "stop"))
            talk.append_observation(told)
            talk.append_sample(Sample(0, listed, [0.0] * len(listed), [None] * len(listed), "stop"))
            made.append(talk)
        return made

    def warm_start(self, steps: int, *, pool: int = 256, batch: int = 32, lr: float = 4e-3) -> None:
        """Teach the form of a conversation, and nothing about what to ask or list first."""
        rng = np.random.default_rng(0)
        made = self.conversations(rng.integers(len(self.requests), size=pool), rng)
        pad = nn.utils.rnn.pad_sequence
        ids = pad([torch.tensor(t.prompt_ids + t.response_ids) for t in made], batch_first=True)
        sampled = pad(
            [torch.tensor([0] * len(t.prompt_ids) + t.policy_mask) for t in made], batch_first=True
        )
        labels = ids.masked_fill(sampled == 0, -100)
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=lr)
        for step in range(steps):
            rows = torch.from_numpy(rng.integers(pool, size=batch))
            loss = self.policy(input_ids=ids[rows], labels=labels[rows], use_cache=False).loss
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            optimizer.step()


def make_world(
    *,
    users: int = 64,
    items: int = 60,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
) -> World:
    rng = np.random.default_rng(seed)
    catalog = Catalog(
        titles=tuple(f"Film {number:03d}" for number in range(1, items + 1)),
        categories=tuple((CATEGORIES[n % len(CATEGORIES)],) for n in range(items)),
        keys=tuple(str(number) for number in range(items)),
    )
    drawn = np.stack([rng.permutation(items)[:5] + 1 for _ in range(users)])
    requests = Requests(
        users=np.arange(users),
        history=drawn[:, :4],
        lengths=np.full(users, 4),
        targets=drawn[:, 4],
        timestamps=np.full(users, NOW),
        history_timestamps=np.full((users, 4), NOW),
    )
    tokenizer = tokens.build_title_tokenizer(catalog, NOW, NOW)
    policy = tiny_policy(
        seed,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 32),
        num_key_value_heads=max(2, hidden // 32),
        max_position_embeddings=512,
        initializer_range=0.08,  # the usual 0.02 leaves so narrow a model on a plateau for long
    )
    trm = FakeTRM(items, {tuple(row[:4].tolist()): int(row[4]) for row in drawn})
    env = RetrievalEnvironment(
        trm,  # type: ignore[arg-type]
        catalog,
        FakeEncoder(),  # type: ignore[arg-type]
        max_calls=2,
        prompts=TitlePrompt(TitleTokens(tokenizer, catalog)),
        options=EnvironmentOptions(show_categories=False, constrain_list=True),
    )
    sampling = sampling or SamplingConfig(top_p=1.0, max_turn_tokens=64)
    engine = TransformersEngine(policy, tokenizer, sampling)
    return World(env, engine, policy, requests)
