"""The policy loss, from log-probs on: element-wise over policy tokens, all float32 [N]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deeprec.rl.config import LossConfig

__all__ = ["TokenStats", "importance_weights", "kl_divergence", "policy_loss", "token_weights"]

LOG_RATIO_LIMIT = 20.0  # exp(20) is far beyond any clip, and finite with room for products


@dataclass(frozen=True)
class TokenStats:
    """What an update reports, summed over tokens and weighted like the loss.

    ``kl`` is how far the policy has moved since the tokens were sampled (k3 of
    :func:`kl_divergence`), ``kl_reference`` its distance from the reference, 0 without one.
    """

    clip_fraction: Tensor
    kl: Tensor
    kl_reference: Tensor
    entropy: Tensor
    logprob_difference: Tensor  # absolute, between the engine and the trainer's old log-probs


def token_weights(lengths: list[int], aggregate: str) -> list[float]:
    """The weight of one token of each trajectory of an update; all tokens together weigh 1.

    ``lengths`` are counts of policy tokens. ``"token"``: every token the same. ``"sequence"``:
    every trajectory the same, its tokens share equally.
    """
    if aggregate == "token":
        total = sum(lengths)
        return [1.0 / total if total else 0.0] * len(lengths)
    if aggregate == "sequence":
        count = sum(length > 0 for length in lengths)
        return [1.0 / (length * count) if length else 0.0 for length in lengths]
    raise ValueError(f"aggregate: expected 'token' or 'sequence', got {aggregate!r}")


def kl_divergence(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy.

    With d = log p - log p_ref: k1 = d (unbiased), k2 = d²/2 (its gradient is that of the KL),
    k3 = exp(-d) - 1 + d (unbiased, never negative). Schulman, "Approximating KL divergence".
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference**2
    if estimator == "k3":
        return torch.exp((-difference).clamp(max=LOG_RATIO_LIMIT)) - 1.0 + difference
    raise ValueError(f"kl_estimator: expected 'k1', 'k2' or 'k3', got {estimator!r}")


def importance_weights(old: Tensor, engine: Tensor, cap: float | None) -> Tensor:
    """min(p_trainer / p_engine, cap) of every sampled token, without gradient; None gives 1."""
    if cap is None:
        return torch.ones_like(old)
    ratio = torch.exp((old - engine).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return ratio.clamp(max=cap).detach()


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    *,
    old: Tensor,
    engine: Tensor,
    advantages: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    config: LossConfig,
) -> tuple[Tensor, TokenStats]:
    """The loss of some of an update's tokens: a scalar to be summed over the rest of them.

    PPO's clipped objective (Schulman et al., arXiv 1707.06347) with a higher upper bound (DAPO,
    arXiv 2503.14476). ``old`` are the trainer's log-probs before the step's first update,
    ``engine`` those the tokens were sampled with, ``weights`` from :func:`token_weights`,
    ``reference`` log-probs or None where there is no KL term.
    """
    distance = torch.zeros_like(logprobs)
    if reference is not None:
        distance = kl_divergence(logprobs, reference, config.kl_estimator)
        if config.kl_estimator == "k1":
            advantages = advantages - config.kl_coef * (old - reference)
    ratio = torch.exp((logprobs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    bounded = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    objective = torch.minimum(ratio * advantages, bounded * advantages)
    loss = -objective * importance_weights(old, engine, config.importance_cap)
    if reference is not None and config.kl_estimator != "k1":
        loss = loss + config.kl_coef * distance
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy
    with torch.no_grad():
        stats = TokenStats(
            clip_fraction=((bounded * advantages < ratio * advantages) * weights).sum(),
            kl=(kl_divergence(old, logprobs, "k3") * weights).sum(),
            kl_reference=(distance * weights).sum(),
            entropy=(entropy * weights).sum(),
            logprob_difference=((old - engine).abs() * weights).sum(),
        )
    return (loss * weights).sum(), stats
