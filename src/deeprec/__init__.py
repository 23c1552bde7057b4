"""deeprec: a language model and a recommender explore an item catalogue together, fast.

The method is DeepRec (Zheng et al., arXiv 2505.16810); the hot paths are this package's own
kernels.
"""

import torch  # noqa: F401  # first, so that the kernels share its OpenMP runtime

from deeprec import backends
from deeprec.integrations import patch, unpatch
from deeprec.ops import (
    AllowedTokens,
    ItemIndex,
    SeenItems,
    TopK,
    gather_logprobs,
    linear_logprobs,
    topk_retrieve,
)

__version__ = "0.1.0"
__all__ = [
    "AllowedTokens",
    "ItemIndex",
    "SeenItems",
    "TopK",
    "__version__",
    "backends",
    "gather_logprobs",
    "linear_logprobs",
    "patch",
    "topk_retrieve",
    "unpatch",
]
