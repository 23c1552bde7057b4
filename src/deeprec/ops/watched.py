"""Whether a call must pass through PyTorch's dispatcher, which takes longer than a small search."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["watched"]


def watched(*tensors: Tensor) -> bool:
    """Whether somebody wants to see an op: a compiler, a tracer, a transform, a mode, a profiler.

    A subclass of Tensor does.

    Where nobody does, an op's body can be called instead. The dispatcher adds 13 us to the 27 that
    one query takes against 2,414 items.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or any(type(tensor) is not Tensor for tensor in tensors)
    )
