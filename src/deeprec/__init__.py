"""deeprec: a language model and a recommender explore an item catalogue together, fast.

The method is DeepRec (Zheng et al., arXiv 2505.16810); the hot paths are this package's own
kernels.
"""

import torch  # noqa: F401  # first, so that the kernels share its OpenMP runtime

from deeprec import backends
from deeprec.ops import AllowedTokens, gather_logprobs, linear_logprobs

__version__ = "0.1.0"
__all__ = ["AllowedTokens", "__version__", "backends", "gather_logprobs", "linear_logprobs"]
