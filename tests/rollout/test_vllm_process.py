"""What holds vLLM, on a stand-in for it: it hangs, fails, leaves workers behind.

vLLM itself is under test in ``with_vllm.py``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_world import make_model

from deeprec.rollout import EngineError, VLLMOptions, vllm_process
from deeprec.rollout.vllm_process import VLLMProcess

POLICY = make_model()


class StandIn:
    """As much of vLLM's engine as is used here."""

    started: ClassVar[list[dict[str, Any]]] = []
    hangs = threading.Event()  # never set: waiting for it hangs
    worker: ClassVar[list[str]] = []

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.calls: list[Any] = []
        self.engine_core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))
        if self.worker:
            self.process = subprocess.Popen(self.worker)

    @classmethod
    def from_engine_args(cls, arguments: dict[str, Any]) -> StandIn:
        cls.started.append({**arguments, "RANK": os.environ.get("RANK")})
        return cls(arguments)

    def step(self) -> list[str]:
        return ["output"]

    def add_request(self, *request: Any) -> None:
        self.calls.append(request)

    def abort_request(self, names: list[str]) -> None:
        self.calls.append(names)

    def collective_rpc(self, name: str, kwargs: dict[str, str]) -> None:
        self.calls.append((name, load_file(Path(kwargs["weights_path"]) / "model.safetensors")))

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    modules = {
        name: ModuleType(name)
        for name in (
            "vllm",
            "vllm.sampling_params",
            "vllm.v1",
            "vllm.v1.engine",
            "vllm.v1.engine.llm_engine",
        )
    }
    modules["vllm"].EngineArgs = modules["vllm"].SamplingParams = dict  # type: ignore[attr-defined]
    modules["vllm.sampling_params"].RequestOutputKind = SimpleNamespace(DELTA="delta")  # type: ignore[attr-defined]
    kind = type("StandIn", (StandIn,), {"started": []})
    modules["vllm.v1.engine.llm_engine"].LLMEngine = kind  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return kind


@pytest.fixture
def process(vllm: type[StandIn]) -> Iterator[VLLMProcess]:
    made = make(timeout=0.2)
    yield made
    made.close()


def make(**options: Any) -> VLLMProcess:
    return VLLMProcess(
        POLICY,
        torch.float32,
        VLLMOptions(**options),
        max_tokens=50,
        logprobs_mode="raw_logprobs",
    )


def test_it_starts_as_it_is_told(vllm: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    made = make(eager=True, max_conversations=7, settings={"block_size": 32})
    (started,) = vllm.started
    assert started["max_model_len"] == 50 and started["max_num_seqs"] == 7
    assert started["enforce_eager"] and started["block_size"] == 32
    assert started["enable_prefix_caching"] and started["dtype"] == "float32"
    # vLLM must not take our launcher's words for its own, and we need them back.
    assert started["RANK"] is None and os.environ["RANK"] == "3"
    folder = Path(started["model"])
    assert (folder / "config.json").is_file()
    made.close()
    assert not folder.exists() and not made.running


def test_requests(process: VLLMProcess) -> None:
    process.add("1", [5, 6], {"max_tokens": 3})
    process.abort("1")
    settings = {"detokenize": False, "output_kind": "delta", "max_tokens": 3}
    assert process._vllm.calls == [("1", {"prompt_token_ids": [5, 6]}, settings), ["1"]]
    assert process.step() == ["output"]


def test_weights_are_the_policys_of_the_moment(process: VLLMProcess) -> None:
    with torch.no_grad():
        for parameter in POLICY.parameters():
            parameter.mul_(1.5)
    process.load_weights()
    (name, weights), reset = process._vllm.calls
    assert (name, reset) == ("reload_weights", "reset")
    for name, parameter in POLICY.named_parameters():
        assert torch.equal(weights[name], parameter)


@pytest.mark.parametrize("call", ["step", "collective_rpc"])
def test_no_call_waits_without_end(
    process: VLLMProcess, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(process._vllm, call, lambda *_, **__: StandIn.hangs.wait(5))
    with pytest.raises(EngineError, match=r"has not answered for 0.2 s"):
        process.step() if call == "step" else process.load_weights()


def test_failures_are_engine_errors(process: VLLMProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise ValueError("EngineDead")

    monkeypatch.setattr(process._vllm, "step", dead)
    with pytest.raises(EngineError, match=r"vLLM failed \(step\): ValueError\('EngineDead'\)"):
        process.step()
    process.stop()
    assert not process.running
    process.sleep()  # nothing to do without vLLM,
    process.abort("1")
    process.load_weights()  # and this is read at the start
    assert not process.running
    process.add("2", [5], {})
    assert process.step() == ["output"]
    assert [call[0] for call in process._vllm.calls] == ["2"]


def test_a_worker_that_hangs_does_not_outlive_its_engine(
    vllm: type[StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "VLLM::Worker"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    monkeypatch.setattr(vllm, "worker", [str(program), "60"])
    monkeypatch.setattr(vllm_process, "STOP_SECONDS", 0.5)
    bystander = subprocess.Popen(["sleep", "60"])
    made = make()
    worker = made._vllm.process
    worker.send_signal(signal.SIGSTOP)
    # Nor does vLLM's own shutdown, if it waits for the worker without end.
    monkeypatch.setattr(made._vllm.engine_core, "shutdown", lambda: StandIn.hangs.wait(5))
    made.close()
    assert not psutil.pid_exists(worker.pid) or worker.wait(5) is not None
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_an_engine_that_does_not_start(
    vllm: type[StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm_process, "SHARED_MEMORY", tmp_path)

    def fail(arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vllm, "from_engine_args", fail)
    with pytest.raises(EngineError, match=r"vLLM failed \(start\): RuntimeError"):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0.0}, r"memory: expected a share in \(0, 1\], got 0.0"),
        ({"max_conversations": 0}, "max_conversations: expected at least 1, got 0"),
        ({"timeout": 0.0}, "timeout: expected seconds > 0, got 0.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMOptions(**options)
