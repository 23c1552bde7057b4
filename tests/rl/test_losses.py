"""The policy loss against its formulas."""

import math

import pytest
import torch
from torch import Tensor

from deeprec.rl.config import LossConfig
from deeprec.rl.losses import importance_weights, kl_divergence, policy_loss, token_weights


def loss_of(
    logprobs: Tensor, *, old: Tensor, advantages: Tensor, config: LossConfig, **given: Tensor
) -> tuple[Tensor, object]:
    ones = torch.full_like(old, 1 / len(old))
    return policy_loss(
        logprobs,
        given.get("entropy", torch.zeros_like(old)),
        old=old,
        engine=given.get("engine", old),
        advantages=advantages,
        weights=given.get("weights", ones),
        reference=given.get("reference"),
        config=config,
    )


def test_first_update_has_the_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, _ = loss_of(logprobs, old=logprobs.detach(), advantages=advantages, config=LossConfig())
    loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages / 3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "clipped"),
    [
        (1.27, 1.0, True, 0.0),
        (1.29, 1.0, False, 1.0),  # the upper bound is 1.28
        (0.5, 1.0, True, 0.0),  # a good token that became unlikely is brought back
        (0.81, -1.0, True, 0.0),
        (0.79, -1.0, False, 1.0),  # the lower bound is 0.8
        (1.5, -1.0, True, 0.0),
    ],
)
def test_clip_bounds(ratio: float, advantage: float, gradient: bool, clipped: float) -> None:
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, stats = loss_of(
        logprobs,
        old=torch.zeros(1),
        advantages=torch.tensor([advantage]),
        config=LossConfig(clip_low=0.2, clip_high=0.28),
    )
    loss.backward()
    assert logprobs.grad is not None
    assert bool(logprobs.grad.abs().sum() > 0) is gradient
    assert float(stats.clip_fraction) == clipped  # type: ignore[attr-defined]


def test_weights_of_tokens_and_sequences() -> None:
    assert token_weights([1, 3, 0], "token") == [0.25, 0.25, 0.25]
    assert token_weights([1, 3, 0], "sequence") == [0.5, 1 / 6, 0.0]
    assert token_weights([0], "token") == [0.0]
    with pytest.raises(ValueError, match="'token' or 'sequence'"):
        token_weights([1], "mean")


def test_kl_estimators_agree_in_expectation() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(50).log_softmax(0), torch.randn(50).log_softmax(0)
    true = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        values = kl_divergence(policy, reference, estimator)
        torch.testing.assert_close((policy.exp() * values).sum(), true)
    assert bool((kl_divergence(policy, reference, "k3") >= 0).all())
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3'"):
        kl_divergence(policy, reference, "k4")


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_kl_gradient_is_that_of_the_divergence(estimator: str) -> None:
    """Summed over the whole distribution, the k1 and k2 terms give the exact gradient of the KL."""
    torch.manual_seed(0)
    logits = torch.randn(12, requires_grad=True)
    reference = torch.randn(12).log_softmax(0)
    logp = logits.log_softmax(0)
    (logp.exp() * (logp - reference)).sum().backward()
    assert logits.grad is not None
    expected = logits.grad.clone()
    logits.grad = None
    logp = logits.log_softmax(0)
    loss, _ = loss_of(
        logp,
        old=logp.detach(),
        advantages=torch.zeros(12),
        weights=logp.detach().exp(),
        reference=reference,
        config=LossConfig(kl_coef=1.0, kl_estimator=estimator),  # type: ignore[arg-type]
    )
    loss.backward()
    torch.testing.assert_close(logits.grad, expected)


def test_importance_weight_is_capped_and_constant() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    engine = torch.tensor([-1.0, -1.5, -9.0])
    weights = importance_weights(old, engine, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(0.5), 2.0]))
    assert not weights.requires_grad
    assert importance_weights(old.detach(), engine, None).tolist() == [1.0, 1.0, 1.0]


def test_entropy_bonus_raises_entropy() -> None:
    entropy = torch.tensor([0.5, 1.0], requires_grad=True)
    loss, _ = loss_of(
        torch.zeros(2),
        old=torch.zeros(2),
        advantages=torch.zeros(2),
        entropy=entropy,
        config=LossConfig(entropy_coef=0.1),
    )
    loss.backward()
    torch.testing.assert_close(entropy.grad, torch.tensor([-0.05, -0.05]))


def test_far_ratios_stay_finite() -> None:
    logprobs = torch.tensor([0.0, -200.0], requires_grad=True)
    old = torch.tensor([-200.0, 0.0])
    loss, stats = loss_of(
        logprobs, old=old, advantages=torch.tensor([-1.0, 1.0]), config=LossConfig()
    )
    assert bool(loss.isfinite())
    assert bool(stats.kl.isfinite())  # type: ignore[attr-defined]
