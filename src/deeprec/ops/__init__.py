"""Public ops: checked, documented and dispatched to the kernels."""

from deeprec.ops.allowed import AllowedTokens
from deeprec.ops.index import IndexStats, ItemIndex
from deeprec.ops.linear_logprobs import linear_logprobs
from deeprec.ops.logprobs import gather_logprobs
from deeprec.ops.seen import SeenItems
from deeprec.ops.topk import TopK, topk_retrieve

# These add themselves to the table of backends.
from deeprec.ops import linear_logprobs_triton, logprobs_triton, topk_triton  # noqa: F401  # isort: skip

__all__ = [
    "AllowedTokens",
    "IndexStats",
    "ItemIndex",
    "SeenItems",
    "TopK",
    "gather_logprobs",
    "linear_logprobs",
    "topk_retrieve",
]
