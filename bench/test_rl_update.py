"""One update of the default policy, its log-probs from the kernels and from plain torch."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from harness import Table

from deeprec.data import Catalog
from deeprec.policy.model import TitlePolicyConfig, build_title_policy
from deeprec.policy.tokenizer import build_title_tokenizer
from deeprec.rl import RLConfig
from deeprec.rl.batching import TrainSequence
from deeprec.rl.updater import PolicyUpdater

TITLES, NOW = 2700, 1_400_000_000  # about what the default data set has
LENGTH, CHOSEN, CHOICES = 160, 24, 20


def sequences(count: int, vocabulary: int) -> list[TrainSequence]:
    """Conversations like those of a default run: most chosen tokens are titles out of 20."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        ids = rng.integers(0, vocabulary, LENGTH)
        positions = np.sort(rng.choice(np.arange(LENGTH // 2, LENGTH), CHOSEN, replace=False))
        allowed: list[tuple[int, ...] | None] = [None] * CHOSEN
        for place in range(CHOSEN // 2, CHOSEN):
            others = rng.choice(vocabulary, CHOICES, replace=False)
            allowed[place] = tuple({int(ids[positions[place]]), *map(int, others)})
        engine = np.full(CHOSEN, -3.0, dtype=np.float32)
        advantages = rng.standard_normal(CHOSEN).astype(np.float32)
        made.append(TrainSequence(ids, positions, engine, allowed, advantages))
    return made


def test_rl_update(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = tuple(f"Film {number}" for number in range(TITLES))
    catalog = Catalog(titles=titles, categories=(("War",),) * TITLES, keys=titles)
    tokenizer = build_title_tokenizer(catalog, NOW, NOW)
    batch = sequences(8 if table.short else 128, len(tokenizer))
    monkeypatch.delenv("DEEPREC_BACKEND", raising=False)

    def update(backend: str) -> Callable[[], dict[str, float]]:
        policy = build_title_policy(TitlePolicyConfig(), tokenizer, seed=0)
        config = RLConfig(train_batch=None)
        updater = PolicyUpdater(policy, config, Accelerator(cpu=True), temperature=1.0)

        def run() -> dict[str, float]:
            os.environ["DEEPREC_BACKEND"] = backend
            try:
                return updater.update(batch, step=0)
            finally:
                del os.environ["DEEPREC_BACKEND"]

        return run

    ours, plain = update("cpu"), update("reference")
    first, expected = ours(), plain()
    for name, value in expected.items():
        assert abs(first[name] - value) <= 1e-5 * max(1.0, abs(value)), name
    table.row(
        "RL update",
        {"sequences": len(batch), "tokens": LENGTH, "chosen": CHOSEN, "V": len(tokenizer)},
        ours={"deeprec": ours},
        peers={"plain torch": plain},
        notes={"loss difference": f"{abs(first['loss'] - expected['loss']):.0e}"},
    )
    assert torch.get_num_threads() == table.threads
