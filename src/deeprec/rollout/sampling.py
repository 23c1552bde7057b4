"""Drawing tokens: seeded per conversation and exact under top-p without sorting a vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deeprec.rollout.types import SamplingConfig

__all__ = ["draw", "mix", "uniforms"]


def mix(*keys: NDArray[Any] | int) -> NDArray[np.uint64]:
    """Hash integers (arrays broadcast) to 64 well-mixed bits.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied once a key.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            bits = np.asarray(key)
            state = (
                state + bits.astype(np.int64).view(np.uint64)
                if bits.dtype != np.uint64
                else state + bits
            )
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64], attempt: int) -> Tensor:
    """One number in [0, 1) per (seed, position, attempt), float64."""
    bits = mix(seeds, positions, attempt) >> np.uint64(11)  # 53 bits, what a double holds
    return torch.from_numpy(np.atleast_1d(bits.astype(np.float64) * 2.0**-53))


def draw(
    logits: Tensor,
    sampling: SamplingConfig,
    seeds: NDArray[np.uint64],
    positions: NDArray[np.int64],
) -> tuple[Tensor, Tensor]:
    """One token a row of ``logits`` [n, V]: ids int64 [n] and log-probs float32 [n].

    Log-probs are after temperature and before top-p. Top-p is drawn by rejection: a token of the
    full distribution is kept if the tokens more likely than it hold less than ``top_p``, else drawn
    again with the next number of its row. That is the nucleus distribution exactly, at one pass
    over the probabilities instead of a sort, and few rows need a second. Equally likely tokens are
    in or out together.

    Raises FloatingPointError when a row has no finite distribution.
    """
    scaled = logits.float()
    if sampling.logprob_temperature != 1.0:
        scaled = scaled / sampling.logprob_temperature
    top, best = scaled.max(dim=-1, keepdim=True)
    weights = (scaled - top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if not bool(torch.isfinite(total).all()):
        raise FloatingPointError(
            "the policy's logits hold NaN or infinities; lower the learning rate or check its dtype"
        )
    if sampling.takes_best:
        tokens = best[:, 0]
    else:
        tokens = _nucleus(weights, sampling.top_p, seeds, positions)
    chosen = scaled.gather(-1, tokens[:, None]) - top - total.log()
    return tokens, chosen[:, 0]


def _nucleus(
    weights: Tensor, top_p: float, seeds: NDArray[np.uint64], positions: NDArray[np.int64]
) -> Tensor:
    """Token ids [n] drawn from unnormalised ``weights`` [n, V] restricted to their nucleus."""
    tokens = torch.empty(len(weights), dtype=torch.int64, device=weights.device)
    cumulative = weights.cumsum(dim=-1)
    open_rows = torch.arange(len(weights), device=weights.device)
    attempt = 0
    while len(open_rows):
        numbers = uniforms(seeds, positions, attempt).to(weights.device)
        total = cumulative[:, -1:]
        # Rounding must not lift the drawn height to the total, where no token is.
        height = (numbers[:, None] * total).float()
        height = torch.minimum(height, torch.nextafter(total, torch.zeros_like(total)))
        drawn = torch.searchsorted(cumulative, height, right=True)
        tokens[open_rows] = drawn[:, 0]
        if top_p == 1:
            break
        likelier = (weights * (weights > weights.gather(-1, drawn))).sum(dim=-1)
        again = likelier >= top_p * total[:, 0]
        if not bool(again.any()):
            break
        open_rows, weights, cumulative = open_rows[again], weights[again], cumulative[again]
        keep = again.cpu().numpy()
        seeds, positions = seeds[keep], positions[keep]
        attempt += 1
    return tokens
