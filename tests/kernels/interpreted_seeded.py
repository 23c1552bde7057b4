"""Faults planted in the Triton kernels must be found by the comparisons or the bounds checks."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_trm import ask, make
from triton.runtime.errors import InterpreterError
from triton_plugin import shrink

import deeprec.kernels
from deeprec import gather_logprobs, linear_logprobs, topk_retrieve
from deeprec.kernels import linear_logprobs as linear_kernels
from deeprec.kernels import linear_logprobs_backward as linear_backward_kernels
from deeprec.kernels import logprobs as gather_kernels
from deeprec.kernels import product as product_kernels
from deeprec.kernels import softmax as softmax_kernels
from deeprec.kernels import topk as topk_kernels
from deeprec.kernels import trm as trm_kernels


def gather(backend: str) -> torch.Tensor:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    return gather_logprobs(logits, torch.tensor([[3], [199], [0]]), backend=backend)


def linear(backend: str) -> torch.Tensor:
    """Values and gradients, over several splits and chunks of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(201, 8, generator=generator, requires_grad=True)
    values = linear_logprobs(hidden, weight, torch.arange(5), backend=backend)
    gradients = torch.autograd.grad(values.sum(), (hidden, weight))
    return torch.cat([values.detach(), *(gradient.flatten() for gradient in gradients)])


def topk(backend: str) -> torch.Tensor:
    """Items whose order tf32 does not get right."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=generator)
    items = direction + 1e-3 * torch.randn(1600, 16, generator=generator)
    return topk_retrieve(direction[None], items, 4, backend=backend).indices


def trm(backend: str) -> torch.Tensor:
    """Histories of several lengths, in a model of one layer more than reads the last position."""
    model = make(hidden=16, inner=20, max_length=5)
    return model.pack().user_vectors(*ask(model, 3), backend=backend)


FAULTS: dict[str, tuple[Callable[[str], torch.Tensor], ModuleType, str, str]] = {
    "mask one too wide": (
        gather,
        gather_kernels,
        "present = (at < tokens) & counted",
        "present = (at <= tokens) & counted",
    ),
    "lanes not rescaled": (gather, softmax_kernels, "total * e + 1.0", "total + 1.0"),
    "last block dropped": (
        gather,
        gather_kernels,
        "for first in range(0, count, BLOCK):",
        "for first in range(0, count - BLOCK, BLOCK):",
    ),
    "vocabulary one too long": (
        linear,
        linear_kernels,
        "inside = columns < vocabulary",
        "inside = columns <= vocabulary",
    ),
    "depth one too long": (
        linear,
        product_kernels,
        "known = at < depth",
        "known = at <= depth",
    ),
    "rows not rescaled": (
        linear,
        linear_kernels,
        "total = f * total + tl.sum(e, 1)",
        "total = total + tl.sum(e, 1)",
    ),
    "earlier chunks forgotten": (
        linear,
        linear_backward_kernels,
        "acc = tl.load(out, mask=valid & (first_column > 0), other=0.0)",
        "acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)",
    ),
    "operands' rounding not bounded": (
        topk,
        topk_kernels,
        "OPERANDS_TF32 = tl.constexpr(2.0**-9 + 2.0**-19)",
        "OPERANDS_TF32 = tl.constexpr(0.0)",
    ),
    "index not complemented": (
        topk,
        topk_kernels,
        "low = ((INDEX_MASK - index) << 1)",
        "low = (index << 1)",
    ),
    "a position that is not the user's": (
        trm,
        trm_kernels,
        "wanted = t < length",
        "wanted = t <= length",
    ),
    "a shift off by one": (
        trm,
        trm_kernels,
        "shift = t - source\n",
        "shift = t - source + 1\n",
    ),
    "a key of the next user": (
        trm,
        trm_kernels,
        "score = tl.where(s < length, score * scale",
        "score = tl.where(s <= length, score * scale",
    ),
}

# Who uses which function of a module that no launcher imports.
BORROWED = {
    softmax_kernels: (gather_kernels, "add_logits"),
    product_kernels: (linear_kernels, "product_tile"),
}


def mutant(module: ModuleType, before: str, after: str, folder: Path) -> ModuleType:
    source = inspect.getsource(module)
    assert source.count(before) == 1, f"{before!r} must be in {module.__name__} once"
    path = folder / "mutant.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None and spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    shrink(changed)
    return changed


def agrees(run: Callable[[str], torch.Tensor]) -> bool:
    try:
        got = run("triton")
    except InterpreterError as error:
        assert "out of bounds" in str(error) or "another program" in str(error)
        return False
    return torch.allclose(got, run("reference"), atol=1e-5)


@pytest.mark.parametrize("run", [gather, linear, topk, trm])
def test_triton_agrees_without_a_fault(run: Callable[[str], torch.Tensor]) -> None:
    assert agrees(run)


@pytest.mark.parametrize("name", FAULTS)
def test_triton_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, module, before, after = FAULTS[name]
    changed = mutant(module, before, after, tmp_path)
    if module in BORROWED:
        borrower, function = BORROWED[module]
        monkeypatch.setattr(borrower, function, getattr(changed, function))
    else:
        monkeypatch.setattr(deeprec.kernels, module.__name__.rpartition(".")[2], changed)
        monkeypatch.setitem(sys.modules, module.__name__, changed)
    assert not agrees(run)
