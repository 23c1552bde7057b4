"""Our conversations under TRL's GRPOTrainer: token for token, with the tool's tokens masked."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="TRL needs Python 3.11")

from tiny_world import FakeEncoder, FakeTRM, ScriptedEngine, make_requests
from trl import GRPOConfig, GRPOTrainer

import deeprec
from deeprec.data import Catalog
from deeprec.integrations.trl_rollout import TRLRollout
from deeprec.policy.model import TitlePolicyConfig, build_title_policy
from deeprec.policy.prompts import TitlePrompt, TitleTokens
from deeprec.policy.tokenizer import build_title_tokenizer
from deeprec.rewards import Rewards
from deeprec.rollout import (
    EnvironmentOptions,
    RetrievalEnvironment,
    SamplingConfig,
    TransformersEngine,
    protocol,
)

ITEMS, FIRST, LAST = 40, 1_300_000_000, 1_400_000_000  # the dates of make_requests


class LengthRewards:
    """Pays the share of sampled tokens that are even, and one for every call."""

    def score(self, trajectories: list[Any]) -> list[Rewards]:
        scored = []
        for made in trajectories:
            even = float(np.mean([token % 2 == 0 for token in made.response_ids]))
            calls = float(len(made.turns))
            scored.append(Rewards(0.0, calls, 0.0, even, 0.0, calls + even))
        return scored


class World:
    """A catalogue, users, a tool and an untrained policy with one token a title."""

    def __init__(self, *, constrain: bool = False) -> None:
        self.catalog = Catalog(
            titles=tuple(f"Film {n:02d}" for n in range(1, ITEMS + 1)),
            categories=tuple(("War",) if n % 2 else ("Drama",) for n in range(ITEMS)),
            keys=tuple(map(str, range(ITEMS))),
        )
        self.tokenizer = build_title_tokenizer(self.catalog, FIRST, LAST)
        config = TitlePolicyConfig(hidden_size=32, layers=1, heads=2)
        self.policy = build_title_policy(config, self.tokenizer, 0)
        self.requests = make_requests(4, n_items=ITEMS)
        self.env = RetrievalEnvironment(
            FakeTRM(ITEMS),
            self.catalog,
            FakeEncoder(),
            k=5,
            max_calls=2,
            prompts=TitlePrompt(TitleTokens(self.tokenizer, self.catalog)),
            options=EnvironmentOptions(show_categories=False, constrain_list=constrain),
        )

    def sampling_engine(self, temperature: float = 1.0) -> TransformersEngine:
        sampling = SamplingConfig(temperature=temperature, top_p=0.9, max_turn_tokens=12)
        return TransformersEngine(self.policy, self.tokenizer, sampling)

    def scripted_engine(self) -> ScriptedEngine:
        def script(conversation: int, turn: int) -> str:
            if turn < 2 - conversation % 2:
                return f"{protocol.PREFERENCE_OPEN}War; Film 0{turn + 1}{protocol.PREFERENCE_CLOSE}"
            titles = [f"Film {n:02d}" for n in range(conversation + 1, conversation + 11)]
            return f"\n{protocol.THINK_CLOSE}\n{protocol.final_list_text(titles)}"

        return ScriptedEngine(self.tokenizer, script)

    def trainer(self, task: TRLRollout, folder: Path, **changes: Any) -> Watched:
        args = GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            per_device_train_batch_size=8,
            num_generations=4,
            **{"learning_rate": 1e-2, "max_steps": 1, "beta": 0.0, **changes},
        )
        return Watched(
            model=self.policy,
            reward_funcs=task.reward_funcs,
            args=args,
            train_dataset=task.dataset(),
            processing_class=self.tokenizer,
            rollout_func=task.rollout,
        )


class Watched(GRPOTrainer):
    """Keeps what the first loss was computed from, and the log-probs TRL gave it."""

    seen: dict[str, Any]
    scored: torch.Tensor

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if not hasattr(self, "seen"):
            self.seen = inputs
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad():
                self.scored = self._get_per_token_logps_and_entropies(
                    model, ids, mask, inputs["completion_ids"].size(1)
                )[0]
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("patched", [False, True])
def test_the_tools_tokens_are_seen_but_not_trained(tmp_path: Path, patched: bool) -> None:
    world = World()
    task = TRLRollout(world.scripted_engine(), world.env, world.requests, LengthRewards())
    made: list[Any] = []
    conversations = task._talk
    task._talk = lambda *args: made.extend(conversations(*args)) or made  # type: ignore[method-assign, func-returns-value]
    trainer = world.trainer(task, tmp_path)
    if patched:
        with deeprec.patch("trl") as handle:
            trainer.train()
            assert "ChunkedLogProbFunction -> deeprec.linear_logprobs: 2 calls" in handle.explain()
    else:
        trainer.train()
    assert len(made) == 8
    assert {len(talk.turns) for talk in made} == {1, 2}
    trained = trainer.seen["completion_mask"] * trainer.seen["tool_mask"]
    rows = {tuple(talk.response_ids): talk for talk in made}
    for ids, mask in zip(trainer.seen["completion_ids"], trained, strict=True):
        talk = next(t for key, t in rows.items() if ids[: len(key)].tolist() == list(key))
        n = len(talk.response_ids)
        assert mask[:n].tolist() == talk.policy_mask
        assert not mask[n:].any()
        text = world.tokenizer.decode(ids[:n][mask[:n] == 0])
        assert text.count(protocol.ITEMS_OPEN) == len(talk.turns)
        assert protocol.PREFERENCE_CLOSE not in text
    logged = trainer.state.log_history[0]
    assert logged["rewards/tool_calls/mean"] == pytest.approx(1.5)
    assert logged["reward"] == pytest.approx(1.5 + logged["rewards/listwise/mean"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trl_scores_sampled_tokens_as_the_engine_did(tmp_path: Path, temperature: float) -> None:
    world = World()
    engine = world.sampling_engine(temperature)
    task = TRLRollout(engine, world.env, world.requests, LengthRewards())
    trainer = world.trainer(task, tmp_path, temperature=temperature)
    made: list[Any] = []
    conversations = task._talk
    task._talk = lambda *args: made.extend(conversations(*args)) or made  # type: ignore[method-assign, func-returns-value]
    trainer.train()
    by_ids = {tuple(talk.response_ids): talk for talk in made}
    assert len(by_ids) > 4  # samples of one prompt differ
    for ids, scored in zip(trainer.seen["completion_ids"], trainer.scored, strict=True):
        talk = next(t for key, t in by_ids.items() if ids[: len(key)].tolist() == list(key))
        n = len(talk.response_ids)
        torch.testing.assert_close(scored[:n], torch.tensor(talk.logprobs), rtol=0, atol=1e-3)


def test_groups_cut_by_a_batch_keep_their_order() -> None:
    world = World()
    task = TRLRollout(world.sampling_engine(), world.env, world.requests, LengthRewards())
    talks = task._talk([2, 0, 2, 1, 2], seed=3)
    users = [int(world.requests.users[row]) for row in (2, 0, 2, 1, 2)]
    assert [talk.user for talk in talks] == users
    assert len({tuple(talk.response_ids) for talk in talks}) == 5


def test_conversations_that_are_too_long_take_no_part() -> None:
    world = World()
    task = TRLRollout(world.sampling_engine(), world.env, world.requests, LengthRewards())
    args = type("Args", (), {"temperature": 1.0})()
    trainer = type("Trainer", (), {"args": args, "accelerator": None})()
    output = task.rollout(["request 0", "request 1"], trainer)
    for talk, mask in zip(output["trajectory"], output["env_mask"], strict=True):
        assert talk.finish == "too_long"  # twelve tokens without an end
        assert mask == [0] * len(talk.response_ids)


def test_bad_input() -> None:
    world = World()
    with pytest.raises(ValueError, match="constrain_list=False"):
        engine = world.sampling_engine()
        TRLRollout(engine, World(constrain=True).env, world.requests, LengthRewards())
    with pytest.raises(ValueError, match="distinct_titles=False"):
        env = World().env
        env.options = replace(env.options, distinct_titles=True)
        TRLRollout(engine, env, world.requests, LengthRewards())
    task = TRLRollout(world.sampling_engine(0.7), world.env, world.requests, LengthRewards())
    args = type("Args", (), {"temperature": 1.0})()
    trainer = type("Trainer", (), {"args": args, "accelerator": None})()
    with pytest.raises(ValueError, match=r"use SamplingConfig\(temperature=1.0\)"):
        task.rollout(["request 0"], trainer)
    task.engine.sampling = SamplingConfig(max_turn_tokens=4)
    for prompt in ("request 4", "request -1", "Hello"):
        with pytest.raises(ValueError, match="names no request"):
            task.rollout([prompt], trainer)
