"""What exact top-k means, in plain torch: the order of every addition is spelt out.

Slow and memory-hungry, but it runs on any device and every kernel must agree with it bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["normalize_rows", "scores", "topk"]

LANES = 8


def _sum_lanes(lanes: Tensor) -> Tensor:
    """``[..., 8]`` summed in the order ((0+4)+(2+6)) + ((1+5)+(3+7))."""
    four = lanes[..., :4] + lanes[..., 4:]
    two = four[..., :2] + four[..., 2:]
    return two[..., 0] + two[..., 1]


def _lanes(values: Tensor) -> Tensor:
    """``[N, D]`` widened to float64 and cut into steps of 8 dimensions, ``[steps, N, 8]``."""
    padded = F.pad(values.double(), (0, -values.shape[1] % LANES))
    return padded.unflatten(1, (-1, LANES)).movedim(1, 0)


def scores(queries: Tensor, items: Tensor) -> Tensor:
    """float32 ``[B, N]``: dot products of queries ``[B, D]`` and items ``[N, D]``.

    Widened to float64, where products are exact; lane j adds the dimensions d ≡ j (mod 8) in
    ascending order; the lanes are summed as in :func:`_sum_lanes`; rounded once.
    """
    total = torch.zeros(len(queries), len(items), LANES, dtype=torch.float64, device=queries.device)
    for query, item in zip(_lanes(queries), _lanes(items), strict=True):
        total = total + query[:, None] * item[None]
    return _sum_lanes(total).float()


def normalize_rows(vectors: Tensor) -> Tensor:
    """Rows divided by their float64 norm, whose squares are summed like a score; float32."""
    total = torch.zeros(len(vectors), LANES, dtype=torch.float64, device=vectors.device)
    for step in _lanes(vectors):
        total = total + step * step
    return (vectors.double() / _sum_lanes(total).sqrt()[:, None]).float()


def topk(
    queries: Tensor, items: Tensor, offsets: Tensor | None, ids: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Values descending, then indices ascending; −inf and −1 where no item is left."""
    values = scores(queries, items)
    gone = torch.zeros_like(values, dtype=torch.bool)
    if offsets is not None and ids is not None:
        row = torch.repeat_interleave(offsets.diff(), output_size=len(ids))
        gone[row, ids] = True
    # Stable sorts by the lesser key first: value, then excluded or not. Adding 0 turns -0 to +0.
    order = (values + 0.0).sort(dim=1, descending=True, stable=True).indices
    last = gone.gather(1, order).to(torch.uint8).sort(dim=1, stable=True).indices
    indices = order.gather(1, last)[:, :k]
    absent = gone.gather(1, indices)
    values = values.gather(1, indices).masked_fill(absent, -torch.inf)
    indices = indices.masked_fill(absent, -1)
    missing = (0, k - indices.shape[1])
    return F.pad(values, missing, value=-torch.inf), F.pad(indices, missing, value=-1)
