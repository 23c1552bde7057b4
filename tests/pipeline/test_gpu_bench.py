"""``deeprec bench``: what it says without a GPU, and that its checks find a wrong kernel."""

from __future__ import annotations

import pytest
import torch

from deeprec import backends, gpu_bench
from deeprec.cli import main

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@no_gpu
def test_bench_without_a_cuda_device_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 1
    assert "sees no CUDA device" in capsys.readouterr().err
    assert main(["bench", "--device", "cpu"]) == 1
    assert "pytest bench/ --benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case", [gpu_bench._topk(1), gpu_bench._gather(), gpu_bench._linear(True), gpu_bench._trm(1)]
)
def test_bench_checks_pass_what_is_right(case: gpu_bench.Case) -> None:
    assert "cpu" in backends.available()[case.op]
    assert case.check("cpu") is None


def test_bench_checks_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_bench.gather_logprobs
    monkeypatch.setattr(gpu_bench, "gather_logprobs", lambda *a, **k: real(*a, **k) * 1.001)
    assert "WRONG" in str(gpu_bench._gather().check("cpu"))
