"""The points that an index's rows are coded about, and the order they are stored in.

Codes resolve a row's distance from its center, so the nearer the center the smaller the bound on
what they leave out, and the more blocks it rules out unread (``csrc/cpu/topk_encode.cpp``). Rows
may have none, one in common, or one a cluster of them. Whatever is chosen here, the bound holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deeprec import _C
from deeprec.ops.topk import item_rows

__all__ = ["Centers", "find_centers", "row_norms", "stored_order"]

# Rows are sorted by norm into classes this many to a factor of two (9% wide): blocks of similar
# norm share a scale well, and rows of one class keep their order.
NORM_CLASSES = 8
# A common part is taken out of the rows if that shortens them by a tenth; rows beyond twice the
# median norm have no say in it.
CENTER_GAIN = 0.9
OUTLIER = 2.0
# Clusters, if rows are then a fifth shorter than about the common center. They have four blocks of
# rows each or more: a query's product with a center costs about as much as with eight rows of
# codes. With more than 512, finding the nearest would be most of the time that building takes.
CLUSTER_GAIN = 0.8
MIN_CLUSTERED_ROWS, CLUSTER_ROWS, MAX_CLUSTERS = 8192, 128, 512
# k-means: rows a cluster it learns from, and rounds of seeding and of improvement.
SAMPLE_ROWS, SEEDINGS, ROUNDS = 32, 4, 6
# Rows that judge whether the clusters pay.
JUDGES = 4096
# Rows handled at once where a float32 copy is needed.
CHUNK = 65536


@dataclass(frozen=True)
class Centers:
    """``points`` float64 ``[C, D]``, the first one the common center; C = 0 is none.

    With clusters, ``nearest`` int64 ``[N]`` is the center of every row, 1 … C − 1.
    """

    points: Tensor
    nearest: Tensor | None = None


def find_centers(items: Tensor, *, clusters: bool = True) -> Centers:
    """What to code these rows about, on the CPU."""
    norms = row_norms(items, None)
    usual = norms <= OUTLIER * norms.median()
    common = _common_center(items, norms, usual)
    points = items.new_empty(0, items.shape[1], dtype=torch.float64)
    if common is not None:
        points = common[None]
        norms = row_norms(items, common)
    if not clusters or len(items) < MIN_CLUSTERED_ROWS:
        return Centers(points)
    found = _cluster(items, usual.nonzero().flatten(), norms)
    if found is None:
        return Centers(points)
    if common is None:
        points = points.new_zeros(1, items.shape[1])
    chunks = range(0, len(items), CHUNK)
    nearest = torch.cat([_nearest(items[i : i + CHUNK].float(), found)[0] for i in chunks])
    return Centers(torch.cat([points, found.double()]), nearest + 1)


def stored_order(items: Tensor, centers: Centers, block_rows: int) -> tuple[Tensor, Tensor]:
    """Item at each position, int32 ``[N]``, and the center of each block, int32 ``[blocks]``.

    Empty where that is the given order, and the first center. Rows of a cluster that do not fill
    a block, those farthest from its center, are coded about the common one, after all others.
    """
    if centers.nearest is None:
        center = centers.points[0] if len(centers.points) else None
        order = _by_norm(row_norms(items, center))
        none = torch.empty(0, dtype=torch.int32)
        as_given = bool((order.diff() == 1).all())
        return none if as_given else order.to(torch.int32), none
    nearest = centers.nearest
    distance = torch.empty(len(items), dtype=torch.float32)
    for i in range(0, len(items), CHUNK):
        part = slice(i, i + CHUNK)
        distance[part] = (items[part].float() - centers.points[nearest[part]].float()).norm(dim=1)
    order = distance.argsort(stable=True)
    order = order[nearest[order].argsort(stable=True)]
    cluster = nearest[order]
    sizes = torch.bincount(cluster, minlength=len(centers.points))
    rank = torch.arange(len(items)) - (sizes.cumsum(0) - sizes)[cluster]
    whole = rank < (sizes // block_rows * block_rows)[cluster]
    left = order[~whole].sort().values
    left = left[_by_norm(row_norms(items[left], centers.points[0]))]
    of_block = torch.zeros(-(-len(items) // block_rows), dtype=torch.int32)
    filled = cluster[whole][::block_rows]
    of_block[: len(filled)] = filled
    return torch.cat([order[whole], left]).to(torch.int32), of_block


def row_norms(items: Tensor, center: Tensor | None) -> Tensor:
    """float64 ``[N]``, |row − center|."""
    if items.device.type != "cpu":
        return items.double().norm(dim=1)
    norms = torch.empty(len(items), dtype=torch.float64)
    _C.topk_row_norms(
        item_rows(items),
        0 if center is None else center.data_ptr(),
        norms.data_ptr(),
        torch.get_num_threads(),
    )
    return norms


def _common_center(items: Tensor, norms: Tensor, usual: Tensor) -> Tensor | None:
    """The common part of the rows, float64 ``[D]``, if taking it out shortens them enough."""
    total = torch.zeros(items.shape[1], dtype=torch.float64)
    for start in range(0, len(items), CHUNK):
        rows = items[start : start + CHUNK].float()
        total += (usual[start : start + CHUNK].float() @ rows).double()
    center = total / usual.sum()
    if not bool(torch.isfinite(center).all()):
        return None
    gained = row_norms(items, center)[usual].mean() < CENTER_GAIN * norms[usual].mean()
    return center if bool(gained) else None


def _by_norm(norms: Tensor) -> Tensor:
    """Rows by descending class of norm, otherwise as they come."""
    classes = (norms.clamp(min=1e-300).log2() * NORM_CLASSES).floor().to(torch.int16)
    return classes.argsort(descending=True, stable=True)


def _cluster(items: Tensor, usual: Tensor, norms: Tensor) -> Tensor | None:
    """Centers of clusters, float32 ``[C, D]``, by k-means on some usual rows, if they pay."""
    count = min(len(items) // CLUSTER_ROWS, MAX_CLUSTERS)
    random = torch.Generator().manual_seed(0)
    drawn = usual[torch.randperm(len(usual), generator=random)]
    judges = drawn[: min(JUDGES, len(drawn) // 4)]
    rows = items[drawn[len(judges) :][: SAMPLE_ROWS * count]].float()
    centers = rows[: count // (SEEDINGS + 1)]
    for _ in range(SEEDINGS):
        # Rows far from all centers are likely to become the next.
        squares = _nearest(rows, centers)[1]
        more = min(count // (SEEDINGS + 1), int((squares > 0).sum()))
        if more == 0 or not bool(torch.isfinite(squares).all()):
            break
        centers = torch.cat([centers, rows[torch.multinomial(squares, more, generator=random)]])
    for _ in range(ROUNDS):
        nearest = _nearest(rows, centers)[0]
        sizes = torch.bincount(nearest, minlength=len(centers))[:, None]
        sums = torch.zeros_like(centers).index_add_(0, nearest, rows)
        centers = torch.where(sizes > 0, sums / sizes.clamp(min=1), centers)
    if not bool(torch.isfinite(centers).all()):
        return None
    distances = _nearest(items[judges].float(), centers)[1].sqrt()
    return centers if distances.mean() < CLUSTER_GAIN * norms[judges].mean() else None


def _nearest(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest center of every row, and the square of its distance."""
    halves = centers.square().sum(1) / 2
    least, nearest = torch.addmm(halves, rows, centers.T, alpha=-1).min(1)
    return nearest, (rows.square().sum(1) + 2 * least).clamp(min=0)
