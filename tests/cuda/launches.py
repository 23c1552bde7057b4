"""What the shipped launchers launch, as the emulator saw it: kernels, blocks, memory, arguments."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from emulation import build, emulating, load
from torch import Tensor

from deeprec import AllowedTokens, ItemIndex, SeenItems, gather_logprobs, linear_logprobs
from deeprec import topk_retrieve as topk
from deeprec.trm import PreferenceAwareTRM, TRMConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    kernel: str  # as short_names gives it
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes, dynamic
    arguments: tuple[bytes, ...]
    memory: dict[int, bytes]  # by address: the first bytes that arguments point to


def short_names(mangled: list[str]) -> dict[str, str]:
    """Kernel names with template arguments, without namespaces and parameters."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    short = {}
    for name, full in zip(mangled, text.splitlines(), strict=True):
        plain = re.sub(r"\(anonymous namespace\)::|deeprec::(cuda::)?(trm::)?|^void ", "", full)
        plain = plain.replace("(bool)", "")
        short[name] = re.sub(r"\((?!int\)|bool\)|Epilogue\)).*$", "", plain)
    return short


def functions(library: Path) -> dict[int, str]:
    """Mangled names of a library's functions by address."""
    text = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^([0-9a-f]+) [tTwW] (\S+)$", text, re.MULTILINE)
    return {int(address, 16): name for address, name in found}


def launches(*calls: Callable[[], object]) -> list[Launch]:
    """What calls of the public ops launch on emulated CUDA."""
    library = build()
    kernels: ModuleType = load(library)
    kernels.set_schedule("forward")
    with emulating(kernels):
        kernels.record_launches()
        for call in calls:
            call()
        recorded = kernels.recorded_launches()
    mangled = functions(library)
    names = short_names(sorted({mangled[address] for address, *_ in recorded}))
    return [
        Launch(names[mangled[address]], grid, threads, shared, tuple(arguments), memory)
        for address, grid, threads, shared, arguments, memory in recorded
    ]


# ---- calls that launch every kernel, small but for what decides a block and its memory; what they
# compute ----


def direct_top_k(dim: int, k: int, rows: int, queries: int) -> list[Tensor]:
    found = []
    for dtype in DTYPES:
        items = torch.randn(rows, dim).to(dtype)
        found += topk(torch.randn(queries, dim), items, k, backend="cuda")
    return found


def indexed_top_k(dim: int, k: int, rows: int, queries: int) -> list[Tensor]:
    found = []
    for dtype in DTYPES:
        index = ItemIndex(torch.randn(rows, dim).to(dtype))
        for batch in (1, queries):  # both sizes of a tile
            seen = SeenItems.from_lists([[0]] * batch)
            found += index.search(torch.randn(batch, dim), k, seen, backend="cuda")
    return found


def gather(rows: int, vocabulary: int) -> list[Tensor]:
    found = []
    for dtype in DTYPES:
        ids = torch.zeros(rows, 1).long()
        for allowed in (None, AllowedTokens.from_lists([[0]] + [None] * (rows - 1))):
            logits = torch.randn(rows, vocabulary).to(dtype).requires_grad_()
            asked = {"allowed": allowed, "backend": "cuda"}
            values = gather_logprobs(logits, ids, **asked)
            found += [values, *torch.autograd.grad(values.sum(), logits)]
            found += gather_logprobs(logits, ids, entropy=True, **asked)
    return found


def linear(rows: int, size: int, vocabulary: int) -> list[Tensor]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        ids = torch.zeros(rows).long()
        for allowed in (None, AllowedTokens.from_lists([[0]] + [None] * (rows - 1))):
            hidden, weight, bias = (
                torch.randn(*shape).to(dtype).requires_grad_()
                for shape in ((rows, size), (vocabulary, size), (vocabulary,))
            )
            asked = {"bias": bias, "allowed": allowed, "backend": "cuda"}
            values = linear_logprobs(hidden, weight, ids, **asked)
            found += [values, *torch.autograd.grad(values.sum(), (hidden, weight, bias))]
            found += linear_logprobs(hidden, weight, ids, entropy=True, **asked)
    return found


def trm(users: int, **shape: int) -> list[Tensor]:
    model = PreferenceAwareTRM(TRMConfig(n_items=50, **shape)).eval()
    width = model.config.max_length
    history, lengths = torch.ones(users, width).long(), torch.full((users,), width)
    preference = torch.randn(users, model.config.text_dim)
    return [model.pack().user_vectors(history, lengths, preference, backend="cuda")]


SMALL_TRM = {"text_dim": 12, "hidden": 40, "inner": 36, "n_heads": 2, "n_experts": 3}
# Every kernel of csrc/cuda.
SMALL: tuple[Callable[[], list[Tensor]], ...] = (
    lambda: trm(2, **SMALL_TRM, max_length=5),
    lambda: direct_top_k(dim=12, k=5, rows=70, queries=3),
    lambda: direct_top_k(dim=12, k=1024, rows=70, queries=1),
    lambda: indexed_top_k(dim=12, k=5, rows=600, queries=17),
    lambda: gather(rows=2, vocabulary=300),
    lambda: linear(rows=3, size=36, vocabulary=150),
)
