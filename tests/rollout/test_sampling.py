"""Drawing tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deeprec.rollout.sampling import draw, mix, uniforms
from deeprec.rollout.types import SamplingConfig


def nucleus_by_sorting(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The distribution draws must follow: the textbook cut of sorted probabilities."""
    probabilities = (logits.double() / temperature).softmax(-1)
    ordered, ids = probabilities.sort(descending=True)
    ordered[ordered.cumsum(0) - ordered >= top_p] = 0
    cut = torch.zeros_like(probabilities).scatter(0, ids, ordered)
    return cut / cut.sum()


def many(logits: Tensor, sampling: SamplingConfig, n: int = 20_000) -> tuple[Tensor, Tensor]:
    positions = np.arange(n, dtype=np.int64)
    return draw(logits.expand(n, -1), sampling, np.full(n, 7, dtype=np.uint64), positions)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 0.95), (0.7, 0.6), (1.5, 1.0), (1.0, 0.1)]
)
def test_draws_follow_the_nucleus_distribution(temperature: float, top_p: float) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(30)
    tokens, _ = many(logits, SamplingConfig(temperature=temperature, top_p=top_p))
    expected = nucleus_by_sorting(logits, temperature, top_p)
    observed = torch.bincount(tokens, minlength=30) / len(tokens)
    assert not observed[expected == 0].any()
    deviation = (expected * (1 - expected) / len(tokens)).sqrt()
    assert ((observed - expected).abs() <= 4.5 * deviation + 1e-9).all()


def test_logprobs_are_after_temperature_and_before_top_p() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    tokens, logprobs = many(logits, SamplingConfig(temperature=0.5, top_p=0.5), n=50)
    expected = (logits / 0.5).log_softmax(-1)[tokens]
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("sampling", [SamplingConfig(greedy=True), SamplingConfig(temperature=0)])
def test_greedy_takes_the_best_and_reports_at_temperature_one(sampling: SamplingConfig) -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    tokens, logprobs = many(logits, sampling, n=10)
    assert tokens.eq(1).all()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[1].expand(10))


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((50,), -torch.inf)
    logits[[3, 20]] = 0.0
    tokens, logprobs = many(logits, SamplingConfig(top_p=1.0))
    assert set(tokens.tolist()) == {3, 20}
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -np.log(2)))


def test_a_draw_depends_on_its_own_seed_and_position_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 100)
    seeds, positions = np.arange(40, dtype=np.uint64), np.arange(40, dtype=np.int64) * 3
    together, _ = draw(logits, SamplingConfig(top_p=0.5), seeds, positions)
    for row in (0, 13, 39):
        one = slice(row, row + 1)
        alone, _ = draw(logits[one], SamplingConfig(top_p=0.5), seeds[one], positions[one])
        assert alone.item() == together[row].item()


def test_numbers_are_uniform_and_different_for_neighbours() -> None:
    seeds, positions = np.meshgrid(np.arange(100), np.arange(100))
    numbers = uniforms(seeds.ravel().astype(np.uint64), positions.ravel(), 0)
    assert numbers.unique().numel() == 10_000
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers.float(), 20, 0, 1)
    assert (counts - 500).abs().max() < 110  # five standard deviations
    assert not torch.equal(numbers, uniforms(seeds.ravel().astype(np.uint64), positions.ravel(), 1))


def test_hash_tells_orders_and_signs_apart() -> None:
    assert (
        len({int(mix(1, 2)), int(mix(2, 1)), int(mix(-1, 2)), int(mix(1)), int(mix(1, 2, 0))}) == 5
    )


def test_logits_that_are_no_distribution_raise() -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(FloatingPointError, match="logits"):
            many(torch.tensor([0.0, bad]), SamplingConfig(), n=1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_turn_tokens": 0}, "max_turn_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingConfig(**arguments)  # type: ignore[arg-type]
