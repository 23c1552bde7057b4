"""pytest plugin: Triton kernels run in the interpreter, each in one small configuration.

The blocks are small so that small problems have several of them, the last one partly full.
"""

import importlib
import pkgutil
from types import ModuleType

import torch
import triton
import triton_interpreter
from triton.runtime.autotuner import Autotuner

SMALL = {
    "gather_forward": {"BLOCK": 64},
    "gather_backward": {"BLOCK": 64},
    "linear_forward": {"BLOCK_T": 16, "BLOCK_V": 16},
    "linear_grad_logits": {"BLOCK_T": 16, "BLOCK_V": 16},
    "linear_grad_hidden": {"BLOCK_M": 16, "BLOCK_N": 16},
    "linear_grad_weight": {"BLOCK_M": 16, "BLOCK_N": 16},
    "scan": {"BLOCK_N": 64},
    "embed": {"BLOCK_T": 8},
    "attention": {"BLOCK_Q": 16},
    "dense": {"BLOCK_M": 16, "BLOCK_N": 32},
    "dense_norm": {"BLOCK_M": 16},
}


def shrink(module: ModuleType) -> None:
    """Leave every tuned kernel of a module its one small configuration."""
    for name, kernel in vars(module).items():
        if isinstance(kernel, Autotuner):
            kernel.configs = [triton.Config(SMALL[name])]


def pytest_configure() -> None:
    triton_interpreter.install()
    # Memory that a kernel should have written, and has not, is then NaN.
    torch.use_deterministic_algorithms(True)
    import deeprec.kernels
    from deeprec.kernels import linear_logprobs
    from deeprec.ops import linear_logprobs_triton

    for module in pkgutil.iter_modules(deeprec.kernels.__path__):
        shrink(importlib.import_module(f"deeprec.kernels.{module.name}"))
    linear_logprobs.SPLIT = 64
    linear_logprobs_triton.CHUNK, linear_logprobs_triton.CHUNK_ROWS = 80, 32
