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
# Long rows are for kernels that run in parallel; interpreted_triton.py has one of its own.
INTERPRETED = ([OPS / "test_logprobs.py", OPS / "test_linear_logprobs.py"], "triton and not long")


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
    files, chosen = INTERPRETED
    options = ["-m", "pytest", "-q", "-p", "triton_plugin", "-p", "no:cacheprovider"]
    printed = run(*options, *map(str, files), "-k", chosen, TRITON_INTERPRET="1")
    assert "passed" in printed and "skipped" not in printed
