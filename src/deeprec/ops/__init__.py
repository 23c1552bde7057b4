"""Public ops: checked, documented and dispatched to the kernels."""

from deeprec.ops import (  # noqa: F401  # each adds itself to the table
    linear_logprobs_cuda,
    linear_logprobs_triton,
    logprobs_cuda,
    logprobs_triton,
    topk_cuda,
    topk_triton,
)
from deeprec.ops.allowed import AllowedTokens
from deeprec.ops.index import IndexStats, ItemIndex
from deeprec.ops.linear_logprobs import linear_logprobs
from deeprec.ops.logprobs import gather_logprobs
from deeprec.ops.seen import SeenItems
from deeprec.ops.sharded_index import ShardedItemIndex, ShardError
from deeprec.ops.topk import TopK, topk_retrieve

__all__ = [
    "AllowedTokens",
    "IndexStats",
    "ItemIndex",
    "SeenItems",
    "ShardError",
    "ShardedItemIndex",
    "TopK",
    "gather_logprobs",
    "linear_logprobs",
    "topk_retrieve",
]
