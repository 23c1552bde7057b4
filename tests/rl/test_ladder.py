"""Does reinforcement learning learn? A ladder from toy rewards to the real thing.

Toys first: a reward for a word of the preference, and one for listing the title of a given slot
first. If those are not learnt, masks or credit are wrong. Then the two stages on MovieTweetings,
with a policy and recommenders that train in minutes: from a rough start, from one that knows the
format alone, and from the best one. docs/RESULTS.md says what the larger default run gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from rl_world import TARGET_SLOT, World

from deeprec.data import Requests
from deeprec.eval import UserMetrics, evaluate_trajectories, evaluate_trm
from deeprec.eval.bootstrap import paired
from deeprec.pipeline.config import RunConfig
from deeprec.pipeline.folder import RunFolder
from deeprec.pipeline.parts import Parts
from deeprec.pipeline.processes import Processes
from deeprec.pipeline.stages import (
    initial_policy,
    pretrain_policy,
    reinforce,
    stage_requests,
    train_recommenders,
)
from deeprec.rl import LossConfig, OptimizerConfig, RLConfig, StageConfig, Trainer
from deeprec.rollout import Trajectory, rollout

pytestmark = pytest.mark.slow

WORD = "War"


def first_title_earns(made: Trajectory, deserved: bool) -> list[float]:
    return [float(deserved and place == 0) for place in range(len(made.ranked))]


def names_the_word(made: Trajectory) -> list[float]:
    return first_title_earns(made, bool(made.turns) and WORD in made.turns[0].preference)


def lists_the_slot_first(made: Trajectory) -> list[float]:
    slot = made.turns[0].retrieved[TARGET_SLOT] if made.turns else 0
    return first_title_earns(made, made.ranked[:1] == [slot])


def learnt(world: World, rewards: object, config: RLConfig) -> tuple[float, float]:
    """Mean outcome reward of the first and the last steps of a training."""
    trainer = Trainer(world.policy, world.engine, world.env, rewards, config)  # type: ignore[arg-type]
    outcome = [step["reward/listwise"] for step in trainer.train(world.requests)]
    return float(np.mean(outcome[:3])), float(np.mean(outcome[-5:]))


@pytest.mark.parametrize("credit", ["sequence", "list_item"])
def test_a_word_in_the_preference(credit: str, make_world: Callable, toy_rewards: type) -> None:
    world = make_world(users=256)
    world.warm_start(80)
    config = RLConfig(
        steps=120, prompts_per_step=16, samples_per_prompt=8, train_batch=None, credit=credit,
        optimizer=OptimizerConfig(lr=1e-3),
    )  # fmt: skip
    before, after = learnt(world, toy_rewards(names_the_word), config)
    assert before < 0.4
    assert after >= 0.95


def test_the_title_of_a_slot_first(make_world: Callable, toy_rewards: type) -> None:
    """Nothing happens for a hundred steps: the policy has to find out that slots exist."""
    world = make_world(users=256, hidden=64)
    world.env.k = 10
    world.warm_start(160)
    config = RLConfig(
        steps=300, prompts_per_step=16, samples_per_prompt=16, train_batch=None,
        credit="list_item", optimizer=OptimizerConfig(lr=5e-4),
    )  # fmt: skip
    before, after = learnt(world, toy_rewards(lists_the_slot_first), config)
    assert before < 0.2
    assert after >= 0.9


# On real data ------------------------------------------------------------------------------------

USERS = 1500


@dataclass
class Study:
    """Policies that start from one pre-training, against one pair of recommenders."""

    folder: Path
    shared: Parts

    def parts(self, name: str, *stages: StageConfig, **warm_start: object) -> Parts:
        """A run of its own with the shared pre-training and recommenders."""
        base = self.shared.config
        start = replace(base.policy.warm_start, **warm_start)  # type: ignore[arg-type]
        config = replace(
            base,
            out=str(self.folder / name),
            policy=replace(base.policy, warm_start=start),
            stages=list(stages),
        )
        folder = RunFolder.of(config)
        folder.root.mkdir()
        folder.trm.symlink_to(self.shared.folder.trm)
        folder.stages.mkdir()
        folder.stage("pretrained").symlink_to(self.shared.folder.stage("pretrained"))
        return Parts(config, folder)

    def train(self, parts: Parts, greedy: bool = True) -> list[list[Trajectory]]:
        """Test conversations of the warm start and after each stage."""
        initial_policy(parts)
        talks, before = [self.talk(parts, "initial", greedy)], "initial"
        for stage, requests in zip(parts.config.stages, stage_requests(parts), strict=True):
            reinforce(parts, stage, before, requests, Processes())
            talks.append(self.talk(parts, stage.name, greedy))
            before = stage.name
        return talks

    @property
    def sample(self) -> Requests:
        return self.shared.dataset.requests("test")[np.arange(USERS)]

    def talk(self, parts: Parts, stage: str, greedy: bool) -> list[Trajectory]:
        sampling = replace(parts.config.sampling, greedy=greedy)
        engine = parts.engine(parts.load_stage(stage), sampling)
        return rollout(engine, parts.environment("valid"), self.sample, samples_per_user=1, seed=0)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("ladder")
    config = RunConfig(out=str(folder / "shared"))
    config.trm = replace(config.trm, max_epochs=4)
    config.policy.warm_start = replace(config.policy.warm_start, conversations=4000)
    shared = Parts(config, RunFolder.of(config))
    shared.folder.root.mkdir()
    pretrain_policy(shared)
    train_recommenders(shared)
    return Study(folder, shared)


def ndcg_gain(after: UserMetrics, before: UserMetrics) -> dict[str, float]:
    return paired(after, before, seed=0)["ndcg@10"]


def stage(name: str, reward: str, steps: int, lr: float) -> StageConfig:
    return StageConfig(
        name, reward=reward, steps=steps, prompts_per_step=32, lr=lr, credit="list_item"  # type: ignore[arg-type]
    )  # fmt: skip


def test_stage_1_from_a_rough_start(study: Study) -> None:
    parts = study.parts("rough", stage("stage1", "cold", 30, 1e-4), conversations=3000)
    before, after = study.train(parts)
    figures = [
        {
            "valid": float(evaluate_trajectories(talks).values["valid_rate"].mean()),
            "calls": float(np.mean([len(talk.turns) for talk in talks])),
            "diversity": float(
                np.mean([r.diversity for r in parts.reward_model("cold").score(talks)])
            ),
        }
        for talks in (before, after)
    ]
    print(figures)
    assert figures[1]["valid"] >= 0.99
    assert figures[1]["calls"] > figures[0]["calls"] + 0.2
    assert figures[1]["diversity"] > figures[0]["diversity"]


def test_stage_2_from_the_format_alone(study: Study) -> None:
    parts = study.parts("format", stage("stage2", "rec", 60, 3e-4), knowledge="none")
    # There is nothing to hold on to.
    parts.config.rl = replace(parts.config.rl, loss=LossConfig())
    # Greedily this start never ends a conversation, which would be all there is to gain.
    before, after = (evaluate_trajectories(talks) for talks in study.train(parts, greedy=False))
    gain = ndcg_gain(after, before)
    trm = evaluate_trm(parts.trm("valid"), study.sample, exclude_history=True)
    print(gain, {"after": after.values["ndcg@10"].mean(), "trm": trm.values["ndcg@10"].mean()})
    assert gain["low"] > 0


def test_stage_2_from_the_best_start(study: Study) -> None:
    parts = study.parts("best", stage("stage2", "rec", 30, 5e-5))
    before, after = (evaluate_trajectories(talks) for talks in study.train(parts))
    gain = ndcg_gain(after, before)
    print(gain)
    assert gain["difference"] >= -0.002
