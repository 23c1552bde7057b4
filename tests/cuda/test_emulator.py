"""The emulator itself: layouts by the PTX ISA, and that it notices what is wrong in a kernel."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulation import ROOT, SCHEDULES, build, load

SELFTEST = Path(__file__).parent / "selftest"


@pytest.fixture(scope="module")
def selftest(request: pytest.FixtureRequest) -> ModuleType:
    return load(build(request.config.getoption("--emulator"), SELFTEST))


def block_sum(module: ModuleType, x: torch.Tensor) -> float:
    out = torch.zeros(1)
    module.block_sum(x.data_ptr(), out.data_ptr(), len(x), 3)
    return float(out)


def matmul(module: ModuleType, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = torch.full((len(a), len(b)), torch.nan)
    module.matmul(a.data_ptr(), b.data_ptr(), c.data_ptr(), len(a), len(b), a.shape[1])
    return c


def matmul_is_right(module: ModuleType) -> bool:
    torch.manual_seed(0)
    a, b = torch.randn(40, 160).bfloat16(), torch.randn(37, 160).bfloat16()
    exact = a.double() @ b.double().T
    return bool(torch.allclose(matmul(module, a, b).double(), exact, atol=1e-4, equal_nan=False))


def sum_is_right(module: ModuleType) -> bool:
    return block_sum(module, torch.arange(1000.0)) == 499_500


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_correct_kernels_are_right_under_every_schedule(selftest, schedule) -> None:
    selftest.set_schedule(**schedule)
    assert sum_is_right(selftest)
    assert matmul_is_right(selftest)


# name, type number, dtype of the elements, elements a register, depth
MMA = [
    ("bf16", 0, torch.bfloat16, 2, 16),
    ("f16", 1, torch.float16, 2, 16),
    ("tf32", 2, torch.float32, 1, 8),
    ("s8", 3, torch.int8, 4, 32),
    ("u8s8", 4, torch.uint8, 4, 32),
]


@pytest.mark.parametrize(("name", "number", "dtype", "pack", "depth"), MMA)
def test_mma_emulated_with_layouts_of_the_ptx_isa(selftest, name, number, dtype, pack, depth):
    """Element by element, from the formulas of the ISA's sections on matrix fragments."""
    torch.manual_seed(0)
    low = 0 if dtype == torch.uint8 else -8
    left = torch.randint(low, 8, (16, depth)).to(dtype)
    right = torch.randint(-8, 8, (depth, 8)).to(torch.int8 if pack == 4 else dtype)
    start = torch.randint(-8, 8, (16, 8)).to(torch.int32 if pack == 4 else torch.float32)
    a = torch.empty(32, 4 * pack, dtype=dtype)
    b = torch.empty(32, 2 * pack, dtype=right.dtype)
    c = torch.empty(32, 4, dtype=start.dtype)
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        for i in range(4 * pack):
            row = group if i // pack % 2 == 0 else group + 8
            column = member * pack + i % pack + (depth // 2 if i >= 2 * pack else 0)
            a[lane, i] = left[row, column]
        for i in range(2 * pack):
            row = member * pack + i % pack + (depth // 2 if i >= pack else 0)
            b[lane, i] = right[row, group]
        for i in range(4):
            c[lane, i] = start[group if i < 2 else group + 8, member * 2 + (i & 1)]
    selftest.one_mma(number, a.data_ptr(), b.data_ptr(), c.data_ptr())
    expected = start.double() + left.double() @ right.double()
    for lane in range(32):
        for i in range(4):
            row, column = (lane >> 2) + (8 if i > 1 else 0), lane % 4 * 2 + (i & 1)
            assert float(c[lane, i]) == float(expected[row, column])


def test_emulated_ldmatrix_transposes(selftest) -> None:
    x = torch.arange(256, dtype=torch.int16)
    out = torch.empty(32, 4, 2, dtype=torch.int16)
    selftest.transpose8(x.data_ptr(), out.data_ptr())
    for lane in range(32):
        for j in range(4):
            for h in range(2):  # element (row lane / 4, column 2 (lane % 4) + h) of the transpose
                assert out[lane, j, h] == x[j * 64 + (lane % 4 * 2 + h) * 8 + lane // 4]


# ---- seeded bugs: each must be noticed ----

BUGS: dict[str, tuple[str, str, Callable[[ModuleType], bool], str]] = {
    "a removed barrier": (
        "partial[threadIdx.x / 32] = sum;\n  __syncthreads();",
        "partial[threadIdx.x / 32] = sum;",
        sum_is_right,
        "wrong",
    ),
    "a wait for one group too few": (
        "cp_async_wait<1>();",
        "cp_async_wait<2>();",
        matmul_is_right,
        "wrong",
    ),
    "a ring one stage short": ("kStages = 3", "kStages = 2", matmul_is_right, "wrong"),
    "a divergent shuffle": (
        "for (int bit = 16; bit > 0; bit /= 2) sum +=",
        "if (threadIdx.x % 2 == 0)\n for (int bit = 16; bit > 0; bit /= 2) sum +=",
        sum_is_right,
        r"deadlock; thread \d+ waits for .*at selftest.cuh:\d+|divergent warp",
    ),
    "an early return": (
        "  float sum = 0;\n",
        "  float sum = 0;\n  if (threadIdx.x >= 64) return;\n",
        sum_is_right,
        r"waits at selftest.cuh:\d+ for a thread that has ended \(early return\)",
    ),
    "a barrier that some threads miss": (
        "partial[threadIdx.x / 32] = sum;\n  __syncthreads();",
        "partial[threadIdx.x / 32] = sum;\n  if (threadIdx.x < 64) __syncthreads();",
        sum_is_right,
        "early return|deadlock",
    ),
    "an index off by one": (
        "int i = int(blockIdx.x) * kSumThreads + int(threadIdx.x); i < n;",
        "int i = int(blockIdx.x) * kSumThreads + int(threadIdx.x); i < n - 1;",
        sum_is_right,
        "wrong",
    ),
    "too much shared memory": (
        "kStages = 3",
        "kStages = 50",
        matmul_is_right,
        "bytes of shared memory",
    ),
}


def mutated(source: Path, target: Path, file: str, old: str, new: str) -> Path:
    """A copy of a folder of kernels with one change."""
    shutil.copytree(source, target)
    text = (target / file).read_text()
    assert text.count(old) == 1, f"the seeded bug does not fit {file} any more: {old!r}"
    (target / file).write_text(text.replace(old, new))
    return target


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_noticed_by_the_emulator(tmp_path: Path, bug: str) -> None:
    old, new, is_right, expected = BUGS[bug]
    folder = mutated(SELFTEST, tmp_path / "selftest", "selftest.cuh", old, new)
    module = load(build("plain", folder))
    noticed = []
    for schedule in SCHEDULES:
        module.set_schedule(**schedule)
        try:
            noticed.append("right" if is_right(module) else "wrong")
        except RuntimeError as error:
            noticed.append(str(error))
    assert any(re.search(expected, what) for what in noticed), noticed


# ---- what keeps the proof honest ----


def test_emulator_conditionals_stay_in_the_wrapper_header() -> None:
    """Kernels and launchers are the same text for nvcc and g++; PTX is in one header, and so are
    the runtime's calls, whose error codes are checked there."""
    forbidden = r"#\s*if|__CUDACC__|__CUDA_ARCH__|\basm\b|__shared__|__activemask|emulat(?!e)"
    forbidden += r"|<<<|\bcuda[A-Z]"
    for file in (ROOT / "csrc" / "cuda").iterdir():
        if file.name == "ptx.cuh":
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            code = line.split("//")[0]
            assert not re.search(forbidden, code), f"{file.name}:{number}: {line.strip()}"
