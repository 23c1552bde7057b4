"""Which backend and which instruction set run: by choice, by environment, by default."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from deeprec import _C, backends, gather_logprobs

LOGITS, IDS = torch.randn(3, 7), torch.tensor([0, 6, 3])


def used() -> list[str]:
    """The backends of the calls of gather_logprobs since the table was reset."""
    return [backend for op, backend in backends.op_table() if op == "gather_logprobs"]


def test_the_kernels_run_unless_something_else_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DEEPREC_BACKEND", raising=False)
    backends.reset_op_table()
    gather_logprobs(LOGITS, IDS)
    assert used() == ["cpu"]
    monkeypatch.setenv("DEEPREC_BACKEND", "reference")
    backends.reset_op_table()
    gather_logprobs(LOGITS, IDS)
    assert used() == ["reference"]
    gather_logprobs(LOGITS, IDS, backend="cpu")  # an argument counts more
    assert used() == ["reference", "cpu"]


def test_a_choice_in_the_environment_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPREC_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: "):
        gather_logprobs(LOGITS, IDS)
    monkeypatch.setenv("DEEPREC_BACKEND", "fast")
    with pytest.raises(ValueError, match="no backend 'fast'; choose one of: "):
        gather_logprobs(LOGITS, IDS)


def test_a_choice_that_cannot_run_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the automatic choice is, and says why."""
    monkeypatch.delenv("DEEPREC_BACKEND", raising=False)
    wide = LOGITS.double()
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run"):
        gather_logprobs(wide, IDS, backend="cpu")
    backends.reset_op_table()
    gather_logprobs(wide, IDS)
    assert used() == ["reference"]
    explained = backends.explain("gather_logprobs", wide)
    assert "gather_logprobs[cpu]: cannot run: " in explained
    assert "gather_logprobs[reference]: runs" in explained


def isa_of_a_process(name: str) -> subprocess.CompletedProcess[str]:
    code = "from importlib.util import module_from_spec, spec_from_file_location as spec\n"
    code += f"module = module_from_spec(spec('deeprec._C', {_C.__file__!r}))\n"  # torch takes long
    code += "module.__spec__.loader.exec_module(module); print(module.isa())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DEEPREC_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", _C.available_isas())
def test_the_environment_forces_an_instruction_set(name: str) -> None:
    done = isa_of_a_process(name)
    assert done.stdout.strip() == name, done.stderr


def test_an_instruction_set_that_is_not_there_is_an_error() -> None:
    done = isa_of_a_process("sse9")
    assert done.returncode != 0
    assert 'isa "sse9" is not available on this machine; choose one of: auto' in done.stderr
