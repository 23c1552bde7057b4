"""Bugs seeded in the kernels that ship, and the same kernels under AddressSanitizer.

A sanitizer's runtime must be loaded before Python: its checks are processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import evidence
import pytest
import torch
from emulation import ROOT, SCHEDULES, build, emulating, load
from launches import SMALL, launches
from small_trm import ask, eager, make
from test_emulator import mutated

from deeprec import linear_logprobs, topk_retrieve

HERE = Path(__file__).parent
SHIPPED = ROOT / "csrc" / "cuda"


def top_k_is_right() -> bool:
    """Lists that overflow and are sorted again while others append."""
    torch.manual_seed(0)
    items, queries = torch.randn(545, 12), torch.randn(2, 12)
    got = topk_retrieve(queries, items, 200, backend="cuda")
    expected = topk_retrieve(queries, items, 200, backend="reference")
    return torch.equal(got.indices, expected.indices) and torch.equal(got.values, expected.values)


def linear_is_right() -> bool:
    """Depth enough for the ring of stages to go round twice, in whole vectors: others wait for
    nothing."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 132), torch.randn(140, 132)
    ids = torch.tensor([0, 77, 139])
    got = linear_logprobs(hidden, weight, ids, backend="cuda")
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[range(3), ids]
    return torch.allclose(got.double(), exact, rtol=0, atol=1e-4)


def trm_is_right() -> bool:
    model = make(2, n_layers=1, n_experts=2)
    asked = ask(model, 2)
    users = model.pack().user_vectors(*asked, backend="cuda")
    return torch.allclose(users, eager(model, *asked), rtol=0, atol=1e-4)


def test_every_shipped_kernel_gives_the_same_under_every_schedule(kernels: ModuleType) -> None:
    """Bit for bit; that the numbers are right is what the other files test."""
    results = []
    with emulating(kernels):
        for schedule in SCHEDULES:
            kernels.set_schedule(**schedule)
            torch.manual_seed(0)
            results.append([tensor.detach() for call in SMALL for tensor in call()])
    launched = {launch.kernel for launch in launches(*SMALL)}
    assert launched == set(json.loads(evidence.RESULT.read_text())["kernels"])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


BUGS: dict[str, tuple[str, str, str, Callable[[], bool]]] = {
    "a removed barrier in the lists of candidates": (
        "topk_best.cuh",
        "    Group::sync();  // nobody appends before everybody has read the count\n",
        "",
        top_k_is_right,
    ),
    "a removed barrier between the stages": (
        "mma_tile.cuh",
        "    __syncthreads();  // the stage is complete",
        "    // the stage is complete",
        linear_is_right,
    ),
    "a wait for one group of copies too few": (
        "mma_tile.cuh",
        "cp_async_wait<kStages - 2>();",
        "cp_async_wait<kStages - 1>();",
        linear_is_right,
    ),
    "a ring one stage short": (
        "mma_tile.cuh",
        "stages_a + kStages * kElementsA;",
        "stages_a + (kStages - 1) * kElementsA;",
        linear_is_right,
    ),
    "a loop that ends one item early": (
        "trm.cuh",
        "for (int64_t s = 0; s < sources; ++s) {",
        "for (int64_t s = 0; s < sources - 1; ++s) {",
        trm_is_right,
    ),
}


@pytest.mark.parametrize("is_right", [top_k_is_right, linear_is_right, trm_is_right])
def test_emulated_kernels_are_right_without_a_bug(every_schedule, is_right) -> None:
    """Else what follows would notice nothing but itself."""
    assert is_right()


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_in_shipped_kernels_are_noticed_by_the_emulator(tmp_path: Path, bug: str) -> None:
    file, old, new, is_right = BUGS[bug]
    kernels = load(build("plain", mutated(SHIPPED, tmp_path / "cuda", file, old, new)))
    noticed = []
    with emulating(kernels):
        for schedule in SCHEDULES:
            kernels.set_schedule(**schedule)
            try:
                noticed.append("right" if is_right() else "wrong")
            except RuntimeError as error:
                noticed.append(str(error))
    assert set(noticed) != {"right"}


def under_address_sanitizer(*arguments: str) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


# One small case of every family of kernels, each with sizes that fill no tile.
SANITIZED = [
    "test_topk_cuda.py::test_fewer_items_left_than_k",
    "test_topk_codes_cuda.py::test_exclusions_and_batches_of_both_tile_sizes",
    "test_logprobs_cuda.py::test_ids_out_of_range_are_nan_and_touch_nothing",
    "test_trm_cuda.py::test_nobody_and_nonsense",
]


def test_emulated_kernels_stay_in_range() -> None:
    build("address")
    options = ["-q", "-p", "no:cacheprovider", "--emulator", "address"]
    done = under_address_sanitizer("-m", "pytest", *options, *(str(HERE / t) for t in SANITIZED))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert f"{len(SANITIZED)} passed" in done.stdout


SEARCH = """
import sys
from pathlib import Path
import torch
from emulation import emulating, load
from deeprec import topk_retrieve
with emulating(load(Path(sys.argv[1]))):
    topk_retrieve(torch.randn(2, 8), torch.randn(50, 8), 3, backend="cuda")
"""


def test_a_read_out_of_range_in_an_emulated_kernel_is_found(tmp_path: Path) -> None:
    """One element past the last item."""
    folder = mutated(SHIPPED, tmp_path / "cuda", "topk_exact.cuh", "d < dim;", "d <= dim;")
    done = under_address_sanitizer("-c", SEARCH, str(build("address", folder)))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "topk_exact.cuh" in done.stderr
