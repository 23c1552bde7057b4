"""Evaluation of a run: baselines, the policy after every stage, what the interaction is worth."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from deeprec.data import Requests
from deeprec.eval import (
    Popularity,
    RecentPopularity,
    UserMetrics,
    build_results,
    conversation_record,
    evaluate_popularity,
    evaluate_ranking,
    evaluate_recent_popularity,
    evaluate_trajectories,
    evaluate_trm,
    evaluate_trm_with_date,
)
from deeprec.eval.results import replace_text, write_results
from deeprec.pipeline.console import heading
from deeprec.pipeline.parts import Parts
from deeprec.pipeline.stages import INITIAL, PRETRAINED, recall_at
from deeprec.policy.pretrain import next_item_logits
from deeprec.rollout import PreferenceOverride, ToolCall, Trajectory, protocol, rollout

__all__ = ["evaluate_run"]


def evaluate_run(parts: Parts) -> dict[str, Any]:
    """Evaluate everything on the test items; writes ``metrics.json`` and ``trajectories.jsonl``."""
    config = parts.config
    everyone = parts.dataset.requests("test")
    rows = np.random.default_rng([config.seed, 2]).permutation(len(everyone))
    sample = everyone[np.sort(rows[: config.eval.users])]
    systems = _baselines(parts, sample)
    if parts.from_scratch:
        systems |= _language_model(parts, sample)

    last = config.stages[-1].name if config.stages else INITIAL
    records: list[dict[str, Any]] = []
    spoken: list[Trajectory] = []
    for name in (INITIAL, *(stage.name for stage in config.stages)):
        heading(f"Evaluating the policy: {name}")
        spoken = _talk(parts, name, sample)
        systems[f"policy_{name}"] = evaluate_trajectories(spoken)
        records += _records(parts, spoken, f"policy_{name}")
    final = f"policy_{last}"
    comparisons = [(final, "trm"), (final, f"policy_{INITIAL}")]
    names = [f"policy_{INITIAL}", *(f"policy_{stage.name}" for stage in config.stages)]
    comparisons += [(b, a) for a, b in itertools.pairwise(names)]
    rivals = ("popularity_recent", "trm_date", "lm", "lm_rerank")
    comparisons += [(final, name) for name in rivals if name in systems]
    if config.eval.ablations:
        for name, trajectories in _ablations(parts, last, sample, spoken).items():
            systems[f"{final}_{name}"] = evaluate_trajectories(trajectories)
            records += _records(parts, trajectories, f"{final}_{name}")
            comparisons.append((final, f"{final}_{name}"))
    results = build_results(systems, list(dict.fromkeys(comparisons)), seed=config.seed)
    if config.eval.all_users and len(sample) < len(everyone):
        heading("Evaluating the final policy on all users")
        results["all_users"] = _all_users(parts, everyone, last)
    k = protocol.LIST_LENGTH
    results["training_recommender"] = {
        f"recall@{k}_on_rl_targets": recall_at(parts, "rl", k),
        f"recall@{k}_on_validation": recall_at(parts, "valid", k),
    }
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    replace_text(parts.folder.trajectories, "\n".join(lines) + "\n")
    write_results(parts.folder.metrics, results)
    return results


def _baselines(parts: Parts, requests: Requests) -> dict[str, UserMetrics]:
    """Popularity and the recommender alone, with and without the request date.

    All know what the evaluation recommender was trained on, and nothing later.
    """
    dataset, exclude = parts.dataset, parts.config.eval.exclude_history
    validation = dataset.requests("valid")
    _, items, timestamps = dataset.train(held_out=2)
    recent = RecentPopularity(items, timestamps, dataset.catalog.n_items)
    trm = parts.trm("valid")
    dated: dict[str, Any] = {
        "recent": recent,
        "recent_validation": recent,
        "exclude_history": exclude,
    }
    popularity = Popularity(items, dataset.catalog.n_items)
    return {
        "popularity": evaluate_popularity(popularity, requests, exclude_history=exclude),
        "popularity_recent": evaluate_recent_popularity(requests, validation, **dated)[0],
        "trm": evaluate_trm(trm, requests, exclude_history=exclude),
        "trm_date": evaluate_trm_with_date(trm, requests, validation, **dated)[0],
    }


def _language_model(parts: Parts, requests: Requests) -> dict[str, UserMetrics]:
    """The pre-trained language model alone, and re-ranking what the recommender finds.

    It gets as many items as all turns of a conversation bring.
    """
    exclude = parts.config.eval.exclude_history
    model = parts.load_stage(PRETRAINED)
    logits = next_item_logits(model, parts.title_prompts, requests, exclude_history=exclude)
    calls = [ToolCall(row, 0, "") for row in range(len(requests))]
    answers = parts.environment("valid", single_turn=True).observe(requests, calls)
    shown = pad_sequence([torch.tensor(answer.items) for answer in answers], batch_first=True)
    order = logits.gather(1, shown).argsort(dim=1, descending=True, stable=True)
    reranked = shown.gather(1, order)[:, : protocol.LIST_LENGTH].numpy()
    top = logits.topk(protocol.LIST_LENGTH).indices.numpy()
    return {
        "lm": evaluate_ranking(top, requests.targets, users=requests.users),
        "lm_rerank": evaluate_ranking(reranked, requests.targets, users=requests.users),
    }


def _talk(
    parts: Parts,
    stage: str,
    requests: Requests,
    *,
    override: PreferenceOverride | None = None,
    single_turn: bool = False,
) -> list[Trajectory]:
    """One greedy conversation a user with the policy of a stage."""
    sampling = replace(parts.config.sampling, greedy=True)
    env = parts.environment("valid", override=override, single_turn=single_turn)
    with closing(parts.engine(parts.load_stage(stage), sampling)) as engine:
        return rollout(engine, env, requests, samples_per_user=1, seed=parts.config.seed)


def _ablations(
    parts: Parts, stage: str, requests: Requests, spoken: Sequence[Trajectory]
) -> dict[str, list[Trajectory]]:
    """The policy with its preferences emptied, with other users', and with a single turn."""
    heading("Evaluating the final policy without its preferences, with others', in one turn")
    others = np.roll(np.arange(len(spoken)), 1)  # requests are in the order of a random sample

    def shuffled(row: int, turn: int, _: str) -> str:
        turns = spoken[others[row]].turns
        return turns[min(turn, len(turns) - 1)].preference if turns else ""

    return {
        "empty_preferences": _talk(parts, stage, requests, override=lambda *_: ""),
        "shuffled_preferences": _talk(parts, stage, requests, override=shuffled),
        "single_turn": _talk(parts, stage, requests, single_turn=True),
    }


def _all_users(parts: Parts, everyone: Requests, last: str) -> dict[str, Any]:
    """The recommender alone and the final policy on all users."""
    final = f"policy_{last}"
    systems = {
        "trm": evaluate_trm(
            parts.trm("valid"), everyone, exclude_history=parts.config.eval.exclude_history
        ),
        final: evaluate_trajectories(_talk(parts, last, everyone)),
    }
    return build_results(systems, [(final, "trm")], seed=parts.config.seed)


def _records(parts: Parts, trajectories: Sequence[Trajectory], system: str) -> list[dict[str, Any]]:
    """The first conversations of a system as they are written to ``trajectories.jsonl``."""
    chosen = trajectories[: parts.config.eval.conversations]
    model = parts.reward_model("rec")
    for trajectory, rewards in zip(chosen, model.score(chosen), strict=True):
        trajectory.rewards = rewards
    return [conversation_record(t, parts.dataset.catalog, system) for t in chosen]
