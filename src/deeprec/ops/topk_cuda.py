"""Exact top-k on CUDA: hands addresses to the kernels of ``csrc/cuda/topk.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops import cuda
from deeprec.ops.topk import OP, item_rows, outputs, pointer, prefilter_view

__all__: list[str] = []

# The kernels' lists of candidates are that long (csrc/cuda/topk.h).
MAX_K = 1024
# An index and one more bit share 32 bits.
MAX_ITEMS = 2**31 - 1


def _run(
    queries: Tensor,
    items: Tensor,
    table: list[Tensor] | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    values, indices, counts = answer = outputs(queries, k)
    if len(queries) == 0:
        return answer
    with cuda.on(queries) as target:
        request = target.kernels.TopkRequest(
            rows=item_rows(items),
            filter=prefilter_view(table if table and len(table[4]) == 0 else None),
            queries=queries.data_ptr(),
            count=len(queries),
            k=k,
            exclude=(pointer(offsets), pointer(ids)),
            multiprocessors=target.multiprocessors,
        )
        needed = target.kernels.topk_workspace_bytes(request)
        workspace = torch.empty(needed, dtype=torch.uint8, device=queries.device)
        target.kernels.topk_search(
            request,
            answer=(values.data_ptr(), indices.data_ptr(), counts.data_ptr()),
            workspace=(workspace.data_ptr(), needed),
            stream=target.stream,
        )
    return answer


def _why_not(queries: Tensor, items: Tensor, k: int = 1) -> str | None:
    if k > MAX_K:
        return f"k = {k} is more than its {MAX_K}"
    if items.shape[0] > MAX_ITEMS:
        return f"{len(items)} items are more than its {MAX_ITEMS}"
    return cuda.why_not(queries, items)


backends.register(OP, "cuda", _run, _why_not)
