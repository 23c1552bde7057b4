"""Where the GPU backends of an op plug in, and the reasons why they may not run.

A GPU backend is a module ``ops/OP_cuda.py`` or ``ops/OP_triton.py`` that hands its kernels to the
op's own hook (``logprobs_op.define``, ``linear_logprobs_op.define``; top-k takes them from the
table) and itself to :func:`deeprec.backends.register`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor

__all__ = ["INTERPRETING", "float32_products", "why_not_triton"]

INSTALLED = find_spec("triton") is not None
# Whether Triton runs its kernels on the CPU, step by step, as the tests make it do. It decides that
# when kernels are defined.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(*tensors: Tensor) -> str | None:
    """None where Triton kernels can run on the tensors, else the reason."""
    for tensor in tensors:
        # torch calls AMD's devices cuda as well
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and INTERPRETING):
            return f"tensors are on {tensor.device}; Triton needs an NVIDIA or AMD GPU"
    if not INSTALLED:
        return "triton is not installed; pip install 'deeprec[gpu]'"
    return None


def float32_products() -> str:
    """The precision that keeps ``tl.dot`` of float32 about exact where kernels run."""
    import triton

    if INTERPRETING or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return "ieee"  # AMD multiplies float32 itself
    return "tf32x3"  # three products of tf32 parts make up one
