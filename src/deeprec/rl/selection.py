"""Which requests are trained on, and in what order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from deeprec.data import Requests
    from deeprec.trm import PreferenceAwareTRM

__all__ = ["prompt_rows", "select_requests"]

BATCH = 1024  # histories scored at once: bounds the memory of the TRM's activations


def select_requests(
    trm: PreferenceAwareTRM,
    requests: Requests,
    *,
    max_rank: int = 100,
    exclude_history: bool = True,
) -> Requests:
    """The requests whose target is among the TRM's first ``max_rank`` without a preference.

    Where the TRM is lost no preference brings the target back, and every sample of the prompt
    earns the same (DeepRec, section 4).
    """
    device = next(trm.parameters()).device
    kept: list[NDArray[np.int64]] = []
    for start in range(0, len(requests), BATCH):
        rows = np.arange(start, min(start + BATCH, len(requests)))
        batch = requests[rows]
        found = trm.retrieve(
            torch.from_numpy(batch.history).to(device),
            torch.from_numpy(batch.lengths).to(device),
            None,
            max_rank,
            exclude_history=exclude_history,
        )
        ranked = found.indices.cpu().numpy()
        kept.append(rows[(ranked == batch.targets[:, None]).any(axis=1)])
    return requests[np.concatenate(kept)] if kept else requests


def prompt_rows(n_requests: int, per_step: int, step: int, seed: int) -> NDArray[np.int64]:
    """Rows of the requests that ``step`` (from 0) uses.

    Steps walk through one shuffle after another, so that every request is used before any is
    used again; a function of its arguments alone, so that a resumed run goes on with the same.
    """
    if per_step > n_requests:
        raise ValueError(
            f"prompts_per_step: expected at most the {n_requests} requests there are, "
            f"got {per_step}"
        )
    first = step * per_step
    wanted = np.arange(first, first + per_step)
    rounds = wanted // n_requests
    shuffles = {
        int(number): np.random.default_rng([seed, int(number)]).permutation(n_requests)
        for number in np.unique(rounds)
    }
    return np.array(
        [shuffles[int(r)][i] for r, i in zip(rounds, wanted % n_requests, strict=True)],
        dtype=np.int64,
    )
