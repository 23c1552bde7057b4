"""Public ops: checked, documented and dispatched to the kernels."""

from deeprec.ops.allowed import AllowedTokens
from deeprec.ops.linear_logprobs import linear_logprobs
from deeprec.ops.logprobs import gather_logprobs

__all__ = ["AllowedTokens", "gather_logprobs", "linear_logprobs"]
