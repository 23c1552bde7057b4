"""The training stages of a run. Each leaves a folder, and is skipped where that folder is."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from deeprec.data import Requests
from deeprec.pipeline.parts import Parts, save_policy
from deeprec.pipeline.processes import Processes
from deeprec.policy.model import build_title_policy
from deeprec.policy.pretrain import pretrain
from deeprec.policy.warmstart import warm_start, written_preferences
from deeprec.rl import StageConfig, Trainer, select_requests
from deeprec.rollout.weights import whole
from deeprec.trm import train_trm

__all__ = [
    "INITIAL",
    "PRETRAINED",
    "initial_policy",
    "pretrain_policy",
    "reinforce",
    "train_recommenders",
]

PRETRAINED = "pretrained"
INITIAL = "initial"


def pretrain_policy(parts: Parts) -> None:
    """Next-item pre-training of the policy built from scratch."""
    target = parts.folder.stage(PRETRAINED)
    if target.is_dir() or not parts.from_scratch:
        return
    config = parts.config
    model = build_title_policy(config.policy.title, parts.tokenizer, config.seed)
    pretrain(model, parts.title_prompts, parts.dataset, config.policy.pretrain, config.seed)
    parts.folder.write_folder(target, lambda folder: save_policy(model, parts.tokenizer, folder))


def train_recommenders(parts: Parts) -> None:
    """Two recommenders: one that has not seen the RL targets, and one for evaluation.

    Where there is a pre-trained policy, the preferences it would write join those made up from
    the data, so that the recommender learns how far such preferences can be trusted.
    """
    config = parts.config
    holdouts: tuple[Literal["rl", "valid"], ...] = ("rl", "valid")
    missing = [name for name in holdouts if not (parts.folder.trm / name).is_dir()]
    if not missing:
        return
    written = []
    if parts.from_scratch and config.trm.written_share > 0:
        model = parts.load_stage(PRETRAINED)
        written = written_preferences(
            model, parts.title_prompts, parts.dataset, config.policy.warm_start, config.seed
        )
    for holdout in missing:
        trained = train_trm(
            parts.dataset,
            parts.encoder,
            replace(config.trm, holdout=holdout, seed=config.seed),
            extra_preferences=written,
        )
        parts.folder.write_folder(parts.folder.trm / holdout, trained.model.save)


def initial_policy(parts: Parts) -> None:
    """The policy that reinforcement learning starts from."""
    target = parts.folder.stage(INITIAL)
    if target.is_dir():
        return
    config = parts.config
    if parts.from_scratch:
        model = parts.load_stage(PRETRAINED)
        warm_start(
            model,
            parts.title_prompts,
            parts.environment("rl"),
            parts.dataset,
            config.policy.warm_start,
            config.seed,
        )
    else:
        model = parts.base_model()
    parts.folder.write_folder(target, lambda folder: save_policy(model, parts.tokenizer, folder))


def stage_requests(parts: Parts) -> list[Requests]:
    """The requests of each stage: users the recommender can help, different ones in each stage.

    Stages share the users in proportion to the prompts they ask for.
    """
    config = parts.config
    chosen = select_requests(
        parts.trm("rl"),
        parts.training_requests,
        max_rank=config.max_rank,
        exclude_history=config.environment.options.exclude_history,
    )
    order = np.random.default_rng([config.seed, 1]).permutation(len(chosen))
    wanted = np.array([stage.steps * stage.prompts_per_step for stage in config.stages])
    ends = (np.cumsum(wanted) / wanted.sum() * len(chosen)).round().astype(int)
    return [chosen[rows] for rows in np.split(order, ends[:-1])]


def reinforce(
    parts: Parts, stage: StageConfig, before: str, requests: Requests, processes: Processes
) -> None:
    """One stage of reinforcement learning, from the policy of the stage ``before``."""
    target = parts.folder.stage(stage.name)
    if target.is_dir():
        return
    config = parts.config
    policy = parts.load_stage(before).float()
    with closing(parts.engine(policy, config.sampling)) as engine:
        trainer = Trainer(
            policy,
            engine,
            parts.environment("rl"),
            parts.reward_model(stage.reward),
            replace(stage.apply(config.rl), out=str(parts.folder.root), seed=config.seed),
        )
        trainer.train(requests, resume=True)
    weights = {}
    for name, value in policy.state_dict().items():
        together = whole(value)  # of a sharded policy, by all processes
        if processes.is_first:
            weights[name] = together.cpu()

    def write(folder: Path) -> None:
        save_policy(policy, parts.tokenizer, folder, weights)

    processes.first(lambda: parts.folder.write_folder(target, write))


def recall_at(parts: Parts, split: Literal["rl", "valid"], k: int) -> float:
    """Recall@k of the training recommender without a preference on the requests of a split."""
    requests = parts.dataset.requests(split)
    kept = select_requests(parts.trm("rl"), requests, max_rank=k)
    return len(kept) / len(requests)
