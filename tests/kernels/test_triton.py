"""The Triton kernels without a GPU: interpreted here, compiled in another process.

Triton decides once, when it is imported, whether it interprets or compiles, and the other tests
of this process need neither.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OPS = HERE.parent / "ops"
INTERPRETED = [
    OPS / "test_logprobs.py",
    OPS / "test_linear_logprobs.py",
    HERE / "interpreted_ops.py",
    HERE / "interpreted_topk.py",
    HERE / "interpreted_trm.py",
    HERE / "interpreted_seeded.py",
]


def run(*command: str, **environment: str) -> str:
    """What a command printed; its whole output is the failure message when it fails."""
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=HERE.parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-20000:]
    return done.stdout


def test_triton_kernels_agree_with_the_reference() -> None:
    options = ["-m", "pytest", "-p", "triton_plugin", "-p", "no:cacheprovider"]
    # A row of a million logits takes the interpreter minutes.
    chosen = ["-k", "triton and not long-triton"]
    printed = run(*options, *map(str, INTERPRETED), *chosen, TRITON_INTERPRET="1")
    assert "passed" in printed and "skipped" not in printed
    # Of a file that finds no backend "triton" nothing would be chosen.
    assert all(f"{file.name} ." in printed for file in INTERPRETED)


def test_triton_kernels_compile_in_every_configuration() -> None:
    run(str(HERE / "triton_evidence.py"), TRITON_INTERPRET="0")
