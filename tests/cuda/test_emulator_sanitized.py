"""Kernels under AddressSanitizer (reads and writes out of range) and ThreadSanitizer (races).

A sanitizer's runtime must be loaded before Python, so each check is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import ROOT, build
from test_emulator import SELFTEST, mutated

RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# Collectives copy between lanes inside the emulator; what kernels access is theirs.
SUPPRESSIONS = "race_top:emulator::\n"
HERE = Path(__file__).parent

SUMS = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("m.emulated", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
x, out = np.arange(1000, dtype=np.float32), np.zeros(1, np.float32)
module.block_sum(x.ctypes.data, out.ctypes.data, len(x), 3)
a, c = np.zeros((40, 160), np.uint16), np.zeros((40, 40), np.float32)
module.matmul(a.ctypes.data, a.ctypes.data, c.ctypes.data, 40, 40, 160)
print("done")
"""


def sanitized(
    flavour: str, tmp_path: Path, *arguments: str, limit: int = 900
) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run(
        ["g++", f"-print-file-name={RUNTIMES[flavour]}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    rules = tmp_path / "suppressions"
    rules.write_text(SUPPRESSIONS)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's
        "TSAN_OPTIONS": f"suppressions={rules}",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=limit,
        check=False,
    )


def sums(flavour: str, folder: Path, tmp_path: Path) -> str:
    """What a sanitizer says about the self-test kernels of a folder."""
    result = sanitized(flavour, tmp_path, "-c", SUMS, str(build(flavour, folder)))
    return result.stdout + result.stderr


@pytest.mark.parametrize("flavour", RUNTIMES)
def test_correct_emulated_kernels_are_clean(flavour: str, tmp_path: Path) -> None:
    said = sums(flavour, SELFTEST, tmp_path)
    assert "done" in said
    assert "Sanitizer" not in said, said[:3000]


def test_an_emulated_read_out_of_range_is_found(tmp_path: Path) -> None:
    folder = mutated(SELFTEST, tmp_path / "selftest", "selftest.cuh", "i < n;", "i <= n;")
    said = sums("address", folder, tmp_path)
    assert "heap-buffer-overflow" in said
    assert "selftest.cuh" in said


def test_an_emulated_race_is_found(tmp_path: Path) -> None:
    old = "= sum;\n  __syncthreads();"
    folder = mutated(SELFTEST, tmp_path / "selftest", "selftest.cuh", old, "= sum;")
    said = sums("thread", folder, tmp_path)
    assert "data race" in said
    assert "selftest.cuh" in said
