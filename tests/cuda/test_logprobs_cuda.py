"""The log-prob kernels on the emulator: the tests of the ops with ``cuda`` among their backends,
and what is the kernels' own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layouts import check_layouts
from test_linear_logprobs import case, check_against_double, gradients, some_allowed

from deeprec import AllowedTokens, gather_logprobs, linear_logprobs

HERE = Path(__file__).parent
OPS = HERE.parent / "ops"


def test_the_ops_tests_pass_on_emulated_cuda() -> None:
    """In a process of its own, whose tests find a backend more."""
    files = [str(OPS / name) for name in ("test_logprobs.py", "test_linear_logprobs.py")]
    options = ["-p", "emulated_plugin", "-p", "no:cacheprovider"]
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
    # Of a file that finds no backend "cuda" nothing would be chosen.
    assert all(f"{Path(file).name} ." in done.stdout for file in files)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_schedule_gives_the_same(every_schedule, dtype: torch.dtype) -> None:
    """Rows and a vocabulary of two tiles; full, restricted and masked rows."""
    hidden, weight, ids = case(rows=131, size=40, vocabulary=150, dtype=dtype)
    allowed, mask = some_allowed(ids, 150), torch.arange(131) % 7 != 0

    def run(h, w, b, backend="cuda"):
        return linear_logprobs(
            h, w, ids, bias=b, mask=mask, allowed=allowed, entropy=True, backend=backend
        )

    bias = torch.randn(150, generator=torch.Generator().manual_seed(2)).to(dtype)
    values, entropy, grads = gradients(run, hidden, weight, bias)
    every_schedule.set_schedule("forward")
    expected = gradients(run, hidden, weight, bias)
    assert torch.equal(values, expected[0]) and torch.equal(entropy, expected[1])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[2], strict=True))
    check_against_double(run, hidden, weight, bias, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_under_every_schedule(every_schedule, dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 333) * 4).to(dtype).requires_grad_()
    ids = torch.randint(333, (5, 3))
    values, entropy = gather_logprobs(logits, ids, entropy=True, backend="cuda")
    (values.sum() + entropy.sum()).backward()
    wide = logits.detach().double().requires_grad_()
    logp = wide.log_softmax(-1)
    exact, exact_entropy = logp.gather(1, ids), -(logp.exp() * logp).sum(-1)
    (exact.sum() + exact_entropy.sum()).backward()
    torch.testing.assert_close(values.double(), exact, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=2e-6, rtol=1e-6)
    near = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.double(), wide.grad, atol=5e-6, rtol=near)


def test_a_batch_split_changes_no_value_and_no_hidden_gradient(emulated) -> None:
    hidden, weight, ids = case(rows=140, size=24, vocabulary=2100)
    whole = hidden.clone().requires_grad_()
    values = linear_logprobs(whole, weight, ids, backend="cuda")
    values.sum().backward()
    for part in (slice(0, 1), slice(1, 140)):
        own = hidden[part].clone().requires_grad_()
        some = linear_logprobs(own, weight, ids[part], backend="cuda")
        some.sum().backward()
        assert torch.equal(some, values[part]) and torch.equal(own.grad, whole.grad[part])


def test_ids_out_of_range_are_nan_and_touch_nothing(emulated) -> None:
    """Looking at them would wait for the GPU."""
    logits, wrong = torch.randn(3, 9), torch.tensor([4, -1, 10**12])
    logits.requires_grad_()
    values = gather_logprobs(logits, wrong, backend="cuda")
    values.nansum().backward()
    assert values.isnan().tolist() == [False, True, True]
    hidden, weight, _ = case(rows=3, size=5, vocabulary=9)
    hidden.requires_grad_()
    values = linear_logprobs(hidden, weight, wrong, backend="cuda")
    values.nansum().backward()
    assert values.isnan().tolist() == [False, True, True]
    allowed = AllowedTokens.from_lists([[4, 5, 10**12], [1], None])
    values = linear_logprobs(
        hidden, weight, torch.tensor([4, 1, 2]), allowed=allowed, backend="cuda"
    )
    assert values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_strides_and_odd_addresses_change_nothing(emulated, dtype: torch.dtype) -> None:
    check_layouts("cuda", dtype)
