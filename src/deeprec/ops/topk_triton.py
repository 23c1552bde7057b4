"""The Triton backend of topk_retrieve: workspaces and launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops.gpu import INTERPRETING, why_not_triton

__all__ = ["run", "why_not"]

MAX_K = 1024
MAX_ITEMS = 2**31 - 2**10  # an index takes 31 bits of a sort key, a tile beyond the end included
# Groups that may be listed for a query: usually a few more than k, up to twice k where the
# prefilter multiplies in bfloat16; the constant leaves room where k is small.
LISTED_PER_K, LISTED_MORE = 2, 256
# Queries a tile holds: three float32 tiles of 64 x 128 fit in the registers of 128 threads.
MIN_TILE, MAX_TILE = 16, 64
# Operands of a product are loaded 128 bytes of a row at a time: one memory transaction.
LOAD_BYTES = 128
# Groups or keys that a program looks at in one step.
STEP = 1024
# Keys that ``exhaust`` keeps a part, at least, and parts it cuts the items into, at most.
MIN_KEPT, MAX_PARTS = 64, 64
# Workspace of a call; more queries than it allows are searched in several rounds.
WORKSPACE_BYTES = 256 * 2**20


def why_not(queries: Tensor, items: Tensor, k: int = 1) -> str | None:
    """None where the kernels can run, else the reason."""
    if min(k, items.shape[0]) > MAX_K:
        return f"k = {k} is more than the {MAX_K} items that the kernels can return"
    if items.shape[0] > MAX_ITEMS:
        return f"{len(items)} items are more than {MAX_ITEMS}"
    return why_not_triton(queries)


@dataclass
class _Plan:
    """Sizes of one search."""

    batch: int
    count: int
    size: int
    k: int
    group: int

    def __post_init__(self) -> None:
        self.groups = -(-self.count // self.group)
        self.capacity = min(LISTED_PER_K * self.k + LISTED_MORE, self.groups)
        self.sorted = max(2, 1 << (self.k - 1).bit_length())
        # Where a query's list overflows, its keys are the best of every part of the items.
        self.kept = max(MIN_KEPT, self.sorted)
        self.capacity = max(self.capacity, self.kept // self.group)
        parts = min(MAX_PARTS, self.capacity * self.group // self.kept)
        steps = -(-self.count // self.kept)
        self.part = -(-steps // parts) * self.kept
        self.parts = -(-self.count // self.part)
        query_bytes = 8 * (self.groups + self.capacity * self.group + self.sorted)
        self.round = max(MIN_TILE, WORKSPACE_BYTES // query_bytes)


def run(
    queries: Tensor,
    items: Tensor,
    table: list[Tensor] | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices and the number of exact scores of every query."""
    from deeprec.kernels import topk as kernels

    batch, count = len(queries), len(items)
    values = queries.new_full((batch, k), -torch.inf)
    indices = queries.new_full((batch, k), -1, dtype=torch.int64)
    counts = queries.new_zeros(2, batch, dtype=torch.int64)
    if batch == 0 or count == 0:
        return values, indices, counts
    if ids is not None and len(ids) == 0:
        offsets = ids = None
    plan = _Plan(batch, count, items.shape[1], min(k, count), kernels.GROUP)
    with torch.cuda.device_of(queries):
        for first in range(0, batch, plan.round):
            some = slice(first, first + plan.round)
            _search(
                plan,
                queries[some],
                items,
                None if offsets is None else offsets[first : first + plan.round + 1],
                ids,
                (values[some, : plan.k], indices[some, : plan.k], counts[0, some]),
            )
    return values, indices, counts


def _search(
    plan: _Plan,
    queries: Tensor,
    items: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    import triton

    from deeprec.kernels import LAUNCH
    from deeprec.kernels import topk as kernels

    batch = len(queries)
    lower, upper = queries.new_empty((2, batch, plan.groups))
    listed = queries.new_empty((batch, plan.capacity), dtype=torch.int32)
    found = queries.new_empty(batch, dtype=torch.int32)
    keys = queries.new_empty((batch, plan.capacity * plan.group), dtype=torch.int64)
    chosen = queries.new_empty((batch, plan.sorted), dtype=torch.int64)
    values = queries.new_empty((batch, plan.k))
    indices = queries.new_empty((batch, plan.k), dtype=torch.int64)
    problem = (queries, items, offsets, ids)

    tile = min(MAX_TILE, max(MIN_TILE, triton.next_power_of_2(batch)))
    kernels.scan[lambda meta: (triton.cdiv(plan.count, meta["BLOCK_N"]), triton.cdiv(batch, tile))](
        *problem,
        lower,
        upper,
        batch,
        plan.count,
        plan.size,
        plan.groups,
        BLOCK_B=tile,
        BLOCK_D=LOAD_BYTES // items.element_size(),
        GROUP=plan.group,
        **_dot(items.dtype),
        **LAUNCH,
    )
    kernels.choose[(batch,)](
        lower, upper, listed, found, plan.groups, plan.k, plan.capacity, BLOCK=STEP, **LAUNCH
    )
    kernels.rescore[(batch, plan.capacity)](
        *problem,
        listed,
        found,
        keys,
        plan.count,
        plan.size,
        plan.capacity,
        GROUP=plan.group,
        num_warps=1,
        **LAUNCH,
    )
    kernels.exhaust[(batch, plan.parts)](
        *problem,
        found,
        keys,
        plan.count,
        plan.size,
        plan.capacity,
        plan.part,
        GROUP=plan.group,
        K=plan.kept,
        num_warps=8 if plan.kept > 256 else 4,
        **LAUNCH,
    )
    kernels.select[(batch,)](
        found,
        keys,
        chosen,
        outputs[2],
        plan.count,
        plan.capacity,
        plan.k,
        plan.parts * plan.kept,
        GROUP=plan.group,
        K=plan.sorted,
        BLOCK=STEP,
        **LAUNCH,
    )
    kernels.order[(batch,)](chosen, values, indices, plan.k, K=plan.sorted, **LAUNCH)
    outputs[0].copy_(values)
    outputs[1].copy_(indices)


def _dot(dtype: torch.dtype) -> dict[str, Any]:
    """How the scan multiplies items of this dtype, for the kernel's constants."""
    import triton
    import triton.language as tl

    if dtype == torch.bfloat16:
        return {"DOT": tl.bfloat16, "PRECISION": "ieee"}
    # The bound allows for truncation to tf32; AMD multiplies float32 itself.
    amd = not INTERPRETING and triton.runtime.driver.active.get_current_target().backend == "hip"
    return {"DOT": tl.float32, "PRECISION": "ieee" if amd else "tf32"}


backends.register("topk_retrieve", "triton", run, why_not)
