"""A training that torchrun or accelerate launch starts: ``train_in_processes.py TASK.json``.

The task names the weights to start from, the configuration's changes, what goes wrong in the last
process (nothing, ``"raise"`` or ``"die"`` in step 3) and where the results go.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from leaving import leave
from rl_world import ToyRewards, make_world

from deeprec.rl import OptimizerConfig, RLConfig, Trainer
from deeprec.rollout import EngineError, Trajectory, TransformersEngine
from deeprec.rollout.weights import whole_parameters

CONFIG = RLConfig(
    steps=4,
    prompts_per_step=7,  # processes get different numbers of them
    samples_per_prompt=4,
    train_batch=15,
    tokens_per_batch=500,
    optimizer=OptimizerConfig(lr=1e-3),
    checkpoint_every=2,
)


def pay(made: Trajectory) -> list[float]:
    """Something that varies within a group, whatever the policy does."""
    return [float(item % 3) for item in made.ranked]


class FailingRewards(ToyRewards):
    """Rewards whose third step goes wrong, as ``how`` says."""

    how = ""
    calls = 0

    def score(self, trajectories: list[Trajectory]) -> list:
        self.calls += 1
        if self.calls == 3 and self.how == "raise":
            raise EngineError("the engine is out of order")
        if self.calls == 3 and self.how == "die":
            os._exit(9)
        return super().score(trajectories)


def make_trainer(weights: Path, config: RLConfig, failure: str = "") -> Trainer:
    """A trainer with the small world's parts."""
    world = make_world()
    world.policy.load_state_dict(torch.load(weights))
    engine = world.engine
    if config.fsdp:
        engine = TransformersEngine(
            world.policy, engine.tokenizer, engine.sampling, copy_weights=True
        )
    rewards = FailingRewards(pay)
    trainer = Trainer(world.policy, engine, world.env, rewards, config)
    if failure and trainer.accelerator.process_index == trainer.accelerator.num_processes - 1:
        rewards.how = failure
    trainer.requests = world.requests  # type: ignore[attr-defined]
    return trainer


def main(task: dict) -> None:
    torch.set_num_threads(1)
    config = replace(CONFIG, **task["changes"])
    weights, out = Path(task["weights"]), Path(task["out"])
    history = []
    for steps in task["sessions"]:  # each resumes what the one before has saved
        trainer = make_trainer(weights, replace(config, steps=steps), task["failure"])
        assert trainer.accelerator.num_processes == 2
        history += trainer.train(trainer.requests, resume=True)  # type: ignore[attr-defined]
    final = dict(whole_parameters(trainer.policy))
    if trainer.accelerator.is_main_process:
        torch.save(final, out / "final.pt")
        (out / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    leave()
