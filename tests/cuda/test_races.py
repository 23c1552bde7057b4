"""That the race checker's answers are of these sources, and that it notices what it is for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import races
from evidence import CUDA, RESULT, sources_digest
from test_emulator import mutated

# By the beginning of their names. In float the linear gradients are undecided: the tool cannot tell
# that their tensors lie apart.
PROVEN = (
    *("trm_dense", "trm_norm", "trm_fuse", "topk_encode"),
    *("bias_gradient", "row_gradients", "finish_tokens"),
    *(f"{name}_kernel<Bf16>" for name in ("hidden_gradient", "weight_gradient", "logit_gradients")),
)
needs_tools = pytest.mark.skipif(
    shutil.which("nvcc") is None or find_spec("sentryward") is None,
    reason="needs nvcc and sentryward",
)


def test_cuda_race_evidence_is_of_these_sources() -> None:
    stored = json.loads(races.RESULT.read_text())
    assert stored["sources"] == sources_digest(), (
        "csrc/cuda has changed: run python tests/cuda/races.py"
    )
    assert set(stored["kernels"]) == set(json.loads(RESULT.read_text())["kernels"])
    results = {kernel["result"] for kernel in stored["kernels"].values()}
    undecided = {"unsupported", "timeout", "analysis_budget_exceeded", "not launched"}
    assert results <= {"race_free", *undecided}
    for part in PROVEN:
        own = {k["result"] for name, k in stored["kernels"].items() if name.startswith(part)}
        assert own == {"race_free"}, part


@needs_tools
@pytest.mark.parametrize("barrier", [True, False])
def test_cuda_race_checker_notices_a_removed_barrier(tmp_path: Path, barrier: bool) -> None:
    """The ring of stages that every product goes through, with its barrier and without."""
    line = "    __syncthreads();  // the stage is complete"
    new = line if barrier else "    // the stage is complete"
    folder = mutated(CUDA, tmp_path / "cuda", "mma_tile.cuh", line, new)
    for other in {*folder.glob("*.cu")} - {folder / "trm.cu"}:
        other.unlink()
    name = "trm_dense_kernel<(Epilogue)0>"
    # As for the evidence, in a process of its own: what the tool can tell depends on where tensors
    # lie and on what lies behind them.
    said = subprocess.run(
        [sys.executable, races.__file__, name, "--sources", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = json.loads(said.removeprefix(name))
    assert found["result"] == ("race_free" if barrier else "potential_race"), found
