"""Next-item pre-training on a made-up data set with an order to learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policy_world import World

from deeprec.policy import pretrain as module
from deeprec.policy.pretrain import PretrainConfig, next_item_logits, pretrain, sequence_logits

CONFIG = PretrainConfig(
    epochs=16, learning_rate=1e-2, batch_size=8, embedding_dropout=0.0, residual_dropout=0.0
)


def test_it_learns_what_comes_next(world: World) -> None:
    model = world.policy()
    records = pretrain(model, world.prompts, world.dataset, CONFIG, seed=0)
    assert records[0]["loss"] > 2.0 > records[-1]["loss"]
    requests = world.dataset.requests("test")
    best = next_item_logits(model, world.prompts, requests).argmax(1).numpy()
    assert (best == requests.targets).mean() > 0.8


def test_it_ends_with_the_best_epoch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[torch.Tensor] = []
    scores = [0.1, 0.3, 0.2]

    def ndcg(model: torch.nn.Module, *_: object) -> float:
        weights.append(model.get_output_embeddings().weight.detach().clone())  # type: ignore[operator]
        return scores[len(weights) - 1]

    monkeypatch.setattr(module, "_validation_ndcg", ndcg)
    model = world.policy()
    config = PretrainConfig(epochs=3, batch_size=16)
    records = pretrain(model, world.prompts, world.dataset, config, seed=0)
    assert [record["valid_ndcg@10"] for record in records] == scores
    assert torch.equal(model.get_output_embeddings().weight, weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_the_same_seed_gives_the_same_policy(world: World) -> None:
    made = []
    for _ in range(2):
        model = world.policy(seed=3)
        pretrain(model, world.prompts, world.dataset, PretrainConfig(epochs=1), seed=3)
        made.append(model.get_output_embeddings().weight)
    assert torch.equal(*made)


def test_logits_leave_out_padding_and_history(world: World) -> None:
    model = world.policy().eval()
    requests = world.dataset.requests("valid")
    logits = next_item_logits(model, world.prompts, requests, batch_size=32)
    assert logits.shape == (len(requests), world.dataset.catalog.n_items + 1)
    closed = torch.isinf(logits)
    for row in range(len(requests)):
        expected = {0, *requests.history[row].tolist()}
        assert set(closed[row].nonzero()[:, 0].tolist()) == expected
    everything = next_item_logits(model, world.prompts, requests, exclude_history=False)
    assert torch.isinf(everything).sum() == len(requests)


def test_one_pass_over_a_sequence_equals_one_request_a_position(world: World) -> None:
    model = world.policy().eval()
    dataset = world.dataset
    seen = []
    for rows, logits in sequence_logits(model, world.prompts, dataset, held_out=2, batch_size=16):
        seen.append(rows)
        asked = next_item_logits(
            model, world.prompts, dataset.requests_at(rows), exclude_history=False
        )
        torch.testing.assert_close(logits[:, 1:], asked[:, 1:], atol=2e-2, rtol=0)  # bf16
    first, last = dataset.offsets[:-1], dataset.offsets[1:]
    expected = [np.arange(a + 1, b - 2) for a, b in zip(first, last, strict=True)]
    assert np.array_equal(np.sort(np.concatenate(seen)), np.concatenate(expected))
