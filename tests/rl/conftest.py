"""Hand-made trajectories and a tiny policy, as functions to call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from deeprec.rewards import Rewards
from deeprec.rollout import Trajectory, Turn

VOCABULARY = 40


def _tiny_policy(seed: int = 0, **changes: object) -> Qwen2ForCausalLM:
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


def _rewards(total: float = 0.0, **parts: float) -> Rewards:
    zero = dict.fromkeys(("format", "tool_calls", "diversity", "listwise", "pointwise"), 0.0)
    return Rewards(**{**zero, **parts}, total=total)


def _trajectory(
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
        rewards=_rewards(),
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def tiny_policy() -> Callable[..., Qwen2ForCausalLM]:
    return _tiny_policy


@pytest.fixture
def make_rewards() -> Callable[..., Rewards]:
    return _rewards


@pytest.fixture
def make_trajectory() -> Callable[..., Trajectory]:
    return _trajectory
