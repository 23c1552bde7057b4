"""What the head of the report says: the facts of a run, and where its result came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deeprec.backends import isa
from deeprec.pipeline.parts import Parts
from deeprec.pipeline.stages import INITIAL

__all__ = ["facts", "notes"]


def facts(parts: Parts) -> dict[str, str]:
    """Names and values: data, models, seed, machine."""
    report, catalog = parts.dataset.report, parts.dataset.catalog
    config = parts.config
    return {
        "Data": f"{report.source}: {parts.dataset.n_users:,} users, {catalog.n_items:,} items, "
        f"{len(parts.dataset.items):,} interactions",
        "Encoder": parts.encoder.name,
        "Policy": config.policy.model
        or f"from scratch, {config.policy.title.layers} layers × {config.policy.title.hidden_size}",
        "Seed": str(config.seed),
        "Machine": f"{torch.get_num_threads()} threads, {isa()}",
    }


def notes(results: Mapping[str, Any], stages: list[str]) -> list[str]:
    """What came from the date, from supervision and from reinforcement learning, in numbers."""
    mean = {name: system["ndcg@10"]["mean"] for name, system in results["systems"].items()}
    initial, final = f"policy_{INITIAL}", f"policy_{stages[-1] if stages else INITIAL}"
    found = []
    if "lm" in mean:
        found.append(
            "The date of a request: the recommender does not know it, the policy does. Given it, "
            f"the recommender reaches {mean['trm_date']:.4f} NDCG@10 (without it "
            f"{mean['trm']:.4f}), popularity in the last days alone "
            f"{mean['popularity_recent']:.4f}; the language model that the policy was before it "
            f"ever talked to the recommender {mean['lm']:.4f}, and {mean['lm_rerank']:.4f} when "
            "it re-ranks what the recommender finds."
        )
    path = " → ".join(f"{mean[f'policy_{name}']:.4f}" for name in (INITIAL, *stages))
    gain = results["paired"].get(f"{final}_vs_{initial}")
    if gain is not None:
        rl = gain["ndcg@10"]
        found.append(
            f"Supervision gave the policy {mean[initial]:.4f}; reinforcement learning changed it "
            f"by {rl['difference']:+.4f} [{rl['low']:+.4f}, {rl['high']:+.4f}] (stage by stage: "
            f"{path})."
        )
    worth = [
        f"{text} {mean[f'{final}_{name}']:.4f}"
        for name, text in (
            ("empty_preferences", "emptied"),
            ("shuffled_preferences", "those of another user"),
        )
        if f"{final}_{name}" in mean
    ]
    if worth:
        found.append(
            f"The preferences: as written {mean[final]:.4f}, {', '.join(worth)}; "
            f"a single turn {mean[f'{final}_single_turn']:.4f}."
        )
    return found
