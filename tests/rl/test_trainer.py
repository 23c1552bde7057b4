"""The step loop, with the real engine and environment."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deeprec.ops import TopK
from deeprec.rl import (
    ADVANTAGES,
    CheckpointError,
    LoRAConfig,
    LossConfig,
    OptimizerConfig,
    RLConfig,
    Trainer,
    TrainingDiverged,
    TrainingInterrupted,
    add_lora,
)
from deeprec.rl.logging import read_metrics
from deeprec.rl.selection import prompt_rows, select_requests
from deeprec.rollout import EngineError, SamplingConfig, Trajectory

CONFIG = RLConfig(
    steps=4,
    prompts_per_step=8,
    samples_per_prompt=4,
    train_batch=16,
    tokens_per_batch=700,
    optimizer=OptimizerConfig(lr=1e-3),
    checkpoint_every=2,
)


def pay(made: Trajectory) -> list[float]:
    """Something that varies within a group, whatever the policy does."""
    return [float(item % 3) for item in made.ranked]


def without_times(history: list[dict]) -> list[dict]:
    timed = ("seconds", "tokens_per_second", "stage", "step")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in history]


@pytest.fixture(autouse=True)
def infinite_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADVANTAGES, "infinite", lambda returns, groups, tokens: returns + np.inf)


@pytest.fixture
def make_trainer(warm_world: Callable, toy_rewards: type) -> Callable[..., Trainer]:
    def make(config: RLConfig = CONFIG, **changes: object) -> Trainer:
        world = warm_world()
        trainer = Trainer(
            world.policy, world.engine, world.env, toy_rewards(pay), replace(config, **changes)
        )
        trainer.requests = world.requests  # type: ignore[attr-defined]
        return trainer

    return make


def train(trainer: Trainer, **settings: object) -> list[dict]:
    return trainer.train(trainer.requests, **settings)  # type: ignore[attr-defined,arg-type]


def test_a_step_reports_everything(make_trainer: Callable, tmp_path: Path) -> None:
    history = train(make_trainer(steps=2, out=str(tmp_path)))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert without_times(lines) == without_times(history)
    wanted = (
        "reward/total reward/format valid_rate tool_calls response_tokens entropy kl kl_reference "
        "clip_fraction grad_norm logprob_difference dropped tokens_per_second/rollout "
        "tokens_per_second/train seconds/rollout seconds/train seconds updates loss"
    )
    assert set(wanted.split()) <= history[0].keys()
    assert history[0]["logprob_difference"] < 1e-4
    assert history[0]["updates"] == 2
    assert sum(v for k, v in history[0].items() if k.startswith("finish/")) == 32
    assert list((tmp_path / "tensorboard" / "rl").iterdir())


@pytest.mark.parametrize("changes", [{}, {"credit": "list_item", "epochs": 2, "train_batch": None}])
def test_resuming_changes_nothing(make_trainer: Callable, tmp_path: Path, changes: dict) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train(make_trainer(out=str(whole), **changes))
    train(make_trainer(steps=2, out=str(broken), **changes))
    trainer = make_trainer(out=str(broken), **changes)
    rest = train(trainer, resume=True)
    assert without_times(rest) == without_times(expected[2:])
    lines = without_times(read_metrics(broken / "metrics.jsonl"))
    assert lines == without_times(expected)


def test_the_same_seed_gives_the_same_run(make_trainer: Callable) -> None:
    first, again, other = (make_trainer(steps=1, seed=seed) for seed in (0, 0, 1))
    assert without_times(train(first)) == without_times(train(again))
    assert without_times(train(other)) != without_times(train(make_trainer(steps=1)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
    make_trainer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    expected = train(make_trainer(steps=3))
    trainer = make_trainer(steps=3, out=str(tmp_path))
    score = trainer.reward_model.score

    def interrupted(made: list[Trajectory]) -> list:
        os.kill(os.getpid(), number)
        return score(made)

    monkeypatch.setattr(trainer.reward_model, "score", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match="stopped after step 1 of 3 and saved"):
        train(trainer)
    assert signal.getsignal(number) == handler
    rest = train(make_trainer(steps=3, out=str(tmp_path)), resume=True)
    assert without_times(rest) == without_times(expected[1:])


def test_a_kill_leaves_half_a_line_at_most(make_trainer: Callable, tmp_path: Path) -> None:
    train(make_trainer(steps=2, out=str(tmp_path)))
    metrics = tmp_path / "metrics.jsonl"
    other = json.dumps({"stage": "other", "step": 7})
    lost = json.dumps({"stage": "rl", "step": 3})  # a step done after the last checkpoint
    metrics.write_text(f'{other}\n{metrics.read_text()}{lost}\n{{"stage": "rl", "st')
    train(make_trainer(steps=3, out=str(tmp_path)), resume=True)
    lines = read_metrics(metrics)
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("other", 7),
        ("rl", 1),
        ("rl", 2),
        ("rl", 3),
    ]


def test_a_checkpoint_is_not_overwritten(make_trainer: Callable, tmp_path: Path) -> None:
    train(make_trainer(steps=1, out=str(tmp_path)))
    with pytest.raises(CheckpointError, match="in the way of a new training: resume it"):
        train(make_trainer(steps=1, out=str(tmp_path)))
    with pytest.raises(CheckpointError, match="written with seed 0, this training has 5"):
        train(make_trainer(steps=2, seed=5, out=str(tmp_path)), resume=True)


@pytest.mark.parametrize("what", ["reward", "loss"])
def test_divergence_stops_before_the_update(
    make_trainer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    train(make_trainer(steps=2, out=str(tmp_path)))
    trainer = make_trainer(out=str(tmp_path), advantage="infinite" if what == "loss" else "rloo")
    score, before = trainer.reward_model.score, {}

    def scored(made: list[Trajectory]) -> list:
        before.update({k: v.clone() for k, v in trainer.policy.state_dict().items()})
        rewards = score(made)
        if what == "reward":
            rewards[5] = replace(rewards[5], total=float("nan"))
        return rewards

    monkeypatch.setattr(trainer.reward_model, "score", scored)
    message = {
        "reward": r"step 3: reward_model gave user \d+ a reward of nan",
        "loss": r"step 3: loss is -inf, the update was not applied",
    }
    with pytest.raises(TrainingDiverged, match=message[what]):
        train(trainer, resume=True)
    for name, value in trainer.policy.state_dict().items():
        assert torch.equal(value, before[name])
    assert [p.name for p in (tmp_path / "checkpoints" / "rl").iterdir()] == ["step-00000002"]


def test_an_engine_that_stops_answering_leaves_a_checkpoint(
    make_trainer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    expected = train(make_trainer(steps=4))
    trainer = make_trainer(steps=4, out=str(tmp_path), checkpoint_every=100)
    step = trainer.engine.step
    monkeypatch.setattr(trainer.engine, "step", lambda: answer(step))

    def answer(step: Callable) -> list:
        if trainer._step == 3:
            raise EngineError("no answer for 5 s")
        return list(step())

    with pytest.raises(EngineError, match=r"failed 3 times in one roll-out, last with: no answer"):
        train(trainer)
    assert "rl: step 4 failed; resume goes on from" in caplog.text
    assert [p.name for p in (tmp_path / "checkpoints" / "rl").iterdir()] == ["step-00000003"]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    rest = train(make_trainer(steps=4, out=str(tmp_path)), resume=True)
    assert without_times(rest) == without_times(expected[3:])


def test_too_long_conversations_are_dropped_and_counted(
    make_trainer: Callable, capsys: pytest.CaptureFixture
) -> None:
    trainer = make_trainer(steps=1)
    trainer.engine.sampling = SamplingConfig(max_turn_tokens=1)
    before = [p.clone() for p in trainer.policy.parameters()]
    history = train(trainer)
    assert history[0]["dropped"] == 32
    assert "updates" not in history[0]
    assert "dropped 32 too long" in capsys.readouterr().out
    assert all(map(torch.equal, before, trainer.policy.parameters()))


def test_bf16_rollout_copy_follows_the_policy(warm_world: Callable, toy_rewards: type) -> None:
    world = warm_world()
    engine = type(world.engine)(
        world.policy, world.engine.tokenizer, world.engine.sampling, dtype=torch.bfloat16
    )
    config = replace(CONFIG, steps=3, precision="bf16", gradient_checkpointing=True)
    trainer = Trainer(world.policy, engine, world.env, toy_rewards(pay), config)
    history = trainer.train(world.requests)
    assert all(1e-6 < line["logprob_difference"] < 0.05 for line in history)


def test_lora_with_kl_to_the_base(warm_world: Callable, toy_rewards: type, tmp_path: Path) -> None:
    def make() -> Trainer:
        world = warm_world()
        torch.manual_seed(0)
        policy = add_lora(world.policy, LoRAConfig(rank=2))
        config = replace(CONFIG, steps=3, loss=LossConfig(kl_coef=0.1), out=str(tmp_path))
        trainer = Trainer(policy, world.engine, world.env, toy_rewards(pay), config)
        trainer.requests = world.requests  # type: ignore[attr-defined]
        return trainer

    trainer = make()
    frozen = trainer.policy.get_base_model().model.embed_tokens.weight.clone()
    history = train(trainer)
    assert history[0]["kl_reference"] < history[-1]["kl_reference"]
    assert torch.equal(frozen, trainer.policy.get_base_model().model.embed_tokens.weight)
    saved = next((tmp_path / "checkpoints" / "rl").glob("step-*/policy.safetensors"))
    assert saved.stat().st_size < frozen.nbytes
    assert train(make(), resume=True) == []


def test_kl_keeps_the_policy_near_a_reference(make_trainer: Callable) -> None:
    def distance(coefficient: float) -> float:
        loss = LossConfig(kl_coef=coefficient, kl_estimator="k2")
        history = train(make_trainer(steps=4, epochs=3, loss=loss))
        return float(history[-1]["kl_reference"])

    assert distance(5.0) < 0.5 * distance(1e-6)


def test_refused(warm_world: Callable, toy_rewards: type) -> None:
    world = warm_world()
    parts = (world.policy, world.engine, world.env, toy_rewards(pay))
    with pytest.raises(ValueError, match=r"prompts_per_step: expected at most the 64 requests"):
        Trainer(*parts, replace(CONFIG, prompts_per_step=65)).train(world.requests)
    with pytest.raises(ValueError, match="advantage: expected one of"):
        Trainer(*parts, replace(CONFIG, advantage="gae"))
    world.engine.sampling = SamplingConfig(temperature=0.0)
    with pytest.raises(ValueError, match="greedy decoding"):
        Trainer(*parts, CONFIG)
    world.engine.sampling = SamplingConfig()
    with pytest.raises(ValueError, match="load it in float32"):
        Trainer(world.policy.to(torch.bfloat16), *parts[1:], CONFIG)
    with pytest.raises(ValueError, match="nothing to train"):
        Trainer(world.policy.requires_grad_(False), *parts[1:], CONFIG)


def test_every_request_is_used_before_any_is_used_again() -> None:
    rows = np.concatenate([prompt_rows(10, 4, step, seed=3) for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert not np.array_equal(rows[:10], rows[10:])
    np.testing.assert_array_equal(prompt_rows(10, 4, 3, seed=3), rows[12:16])


def test_selection_keeps_what_the_recommender_ranks_high(warm_world: Callable) -> None:
    world = warm_world()

    def ranked_by_id(history, lengths, preference, k, *, exclude_history):
        assert exclude_history
        return TopK(torch.zeros(len(history), k), torch.arange(1, k + 1).expand(len(history), k))

    world.env.trm.retrieve = ranked_by_id
    kept = select_requests(world.env.trm, world.requests, max_rank=20)
    assert 0 < len(kept) < len(world.requests)
    assert kept.targets.max() <= 20
    assert len(select_requests(world.env.trm, world.requests[:0], max_rank=20)) == 0
