"""Comparing what a patched function computes with the peer's own and with float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def run(call: Callable[..., Any], *inputs: Tensor, weights: Tensor) -> list[Tensor]:
    """Outputs of ``call``, then the inputs' gradients of a weighted sum of them all."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    made = call(*leaves)
    outputs = [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None]
    wanted = [x for x in outputs if x.requires_grad]
    sum((x.double() * weights).sum() for x in wanted).backward()
    return [*(x.detach() for x in outputs), *(x.grad for x in leaves)]


def assert_no_worse(ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor]) -> None:
    """Dtypes and shapes alike; errors at most twice theirs, up to the rounding of the result."""
    assert len(ours) == len(theirs) == len(truth)
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        rounding = 2 * torch.finfo(mine.dtype).eps * exact.abs().max()
        error, allowed = (mine - exact).abs().max(), 2 * (other - exact).abs().max() + rounding
        assert error <= allowed, f"{float(error)} > {float(allowed)}"


def logits_and_ids(lead: tuple[int, ...], vocabulary: int, many: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(*lead, vocabulary, generator=generator)
    shape = (*lead, many) if many else lead
    return logits, torch.randint(vocabulary, shape, generator=generator)
