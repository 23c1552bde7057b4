"""The compiled CUDA kernels: importable without a driver, and clear about what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import evidence
import pytest
import torch
from emulation import emulating
from small_trm import ask, make

from deeprec import _C, gather_logprobs, linear_logprobs, topk_retrieve
from deeprec.ops import cuda

# What the names of bindings that launch end in.
LAUNCHERS = ("_search", "_logprobs", "_backward", "_encode", "_fuse")
needs_build = pytest.mark.skipif(not hasattr(_C, "cuda"), reason="built without nvcc")


@needs_build
def test_cuda_build_says_what_it_is_for() -> None:
    assert {80, 90, 100, 120} <= set(_C.cuda.ARCHITECTURES)
    if not torch.cuda.is_available():
        why = cuda.Runtime().why_not(torch.device("cuda"))
        assert why is not None
        assert "no CUDA device" in why


@needs_build
def test_a_cuda_launch_without_a_driver_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    rows = _C.ItemRows(0, 0, 1, 1, "float32")
    request = _C.cuda.TopkRequest(
        rows=rows,
        filter=_C.Prefilter(),
        queries=0,
        count=1,
        k=1,
        exclude=(0, 0),
        multiprocessors=1,
    )
    needed = _C.cuda.topk_workspace_bytes(request)
    with pytest.raises(ValueError, match="workspace: expected"):
        _C.cuda.topk_search(request, answer=(0, 0, 0), workspace=(0, needed - 1), stream=0)
    with pytest.raises(RuntimeError, match="CUDA: topk_direct: "):
        _C.cuda.topk_search(request, answer=(0, 0, 0), workspace=(0, needed), stream=0)


def calls() -> dict[str, Callable[[], Any]]:
    """A small call of every launcher, by its name; what it needs of others has been computed."""
    model = make(1)
    history, lengths, preference = ask(model, 2)
    states = model.pack().history_states(history, lengths, backend="cuda")
    hidden, weight = torch.randn(3, 8).requires_grad_(), torch.randn(9, 8).requires_grad_()
    asked = {"token_ids": torch.zeros(3).long(), "backend": "cuda"}
    gathered, linear = gather_logprobs(hidden, **asked), linear_logprobs(hidden, weight, **asked)

    def backward(values: torch.Tensor) -> None:
        torch.autograd.grad(values.sum(), hidden, retain_graph=True)

    return {
        "topk_search": lambda: topk_retrieve(hidden.detach(), weight.detach(), 2, backend="cuda"),
        "gather_logprobs": lambda: gather_logprobs(hidden, **asked),
        "gather_logprobs_backward": lambda: backward(gathered),
        "linear_logprobs": lambda: linear_logprobs(hidden, weight, **asked),
        "linear_logprobs_backward": lambda: backward(linear),
        "trm_encode": lambda: model.pack().history_states(history, lengths, backend="cuda"),
        "trm_fuse": lambda: model.pack().user_vectors(
            None, None, preference, states=states, backend="cuda"
        ),
    }


@needs_build
def test_every_cuda_launcher_without_a_driver_is_an_error(emulated: ModuleType) -> None:
    """The launchers that nvcc built, in the emulated ones' place."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    assert set(calls()) == {name for name in vars(_C.cuda) if name.endswith(LAUNCHERS)}
    for call in calls().values():
        with emulating(_C.cuda), pytest.raises(RuntimeError, match=r"^CUDA: [\w, ]+: "):
            call()


def test_cuda_workspaces_too_small_or_unaligned_are_refused(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every launcher that takes one, before it launches anything."""
    for name, call in calls().items():
        if name.startswith("gather"):
            continue
        launcher = getattr(emulated, name)
        for change, message in (
            (lambda at, size: (at, size - 1), "workspace: expected"),
            (lambda at, size: (at + 4, size), "workspace must be aligned to 16 bytes"),
        ):

            def changed(*args: Any, workspace: tuple[int, int], **rest: Any) -> None:
                launcher(*args, workspace=change(*workspace), **rest)  # noqa: B023

            monkeypatch.setattr(emulated, name, changed)
            with pytest.raises(ValueError, match=message):
                call()
        monkeypatch.setattr(emulated, name, launcher)


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "capability 7.5"),
        ((8, 0), None),
        ((8, 6), None),
        ((11, 0), "11.0"),
        ((13, 0), None),
    ],
)
def test_older_devices_than_the_cuda_build_are_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None
) -> None:
    class Built:
        ARCHITECTURES = (80, 90, 100, 120)

    monkeypatch.setattr(_C, "cuda", Built, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    why = cuda.Runtime().why_not(torch.device("cuda"))
    assert (why is None) == (reason is None)
    assert reason is None or reason in str(why)


@pytest.mark.parametrize("file", ["cuda/topk_codes.cuh", "cuda/trm.cu", "cpu/softmax_state.h"])
def test_cuda_evidence_of_other_sources_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Of kernels, launchers, and headers that they share with the CPU."""
    shutil.copytree(evidence.CUDA.parent, tmp_path / "csrc")
    monkeypatch.setattr(evidence, "CUDA", tmp_path / "csrc" / "cuda")
    before = evidence.sources_digest()
    with (tmp_path / "csrc" / file).open("a") as text:
        text.write(" ")
    assert evidence.sources_digest() != before


def test_cuda_evidence_is_of_these_sources_and_files_agree() -> None:
    stored = json.loads(evidence.RESULT.read_text())
    assert stored["sources"] == evidence.sources_digest(), (
        "csrc/cuda has changed: build, then run python tests/cuda/evidence.py"
    )
    assert evidence.problems(stored["kernels"]) == []
    assert stored["rooflines"] == evidence.rooflines()
    assert evidence.RESULT.with_suffix(".md").read_text() == evidence.markdown(stored)
    for by_architecture in stored["kernels"].values():
        assert set(by_architecture) == set(evidence.ARCHITECTURES)
