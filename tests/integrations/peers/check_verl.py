"""verl with the patch on and off; run by test_peers.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
import torch
from numerics import FLOATS, assert_no_worse, logits_and_ids, run
from torch import Tensor

# verl's packages import ray and more; the three files that are patched do not.
_root = metadata.distribution("verl").locate_file("verl")
for name in ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel"):
    package = ModuleType(name)
    package.__path__ = ["/".join([str(_root), *name.split(".")[1:]])]
    sys.modules[name] = package

import verl.utils.experimental.torch_functional as fused
import verl.utils.kernel.linear_cross_entropy as kernel
import verl.utils.torch_functional as functional

import deeprec
from deeprec.integrations import explain


@pytest.fixture(autouse=True)
def _unpatched_afterwards() -> Iterator[None]:
    yield
    deeprec.unpatch()


@pytest.mark.parametrize("dtype", FLOATS)
def test_log_probs(dtype: torch.dtype) -> None:
    logits, ids = logits_and_ids((3, 11), 507)
    logits, weights = logits.to(dtype), torch.randn(3, 11)

    def call(x: Tensor) -> Any:
        return functional.logprobs_from_logits(x, ids)

    truth = run(call, logits.double(), weights=weights)
    theirs = run(call, logits, weights=weights)
    with deeprec.patch("verl"):
        ours = run(call, logits, weights=weights)
        assert "logprobs_from_logits -> deeprec.gather_logprobs: 1 calls" in explain()
    assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
def test_entropies(name: str, dtype: torch.dtype) -> None:
    logits, weights = logits_and_ids((19,), 300)[0].to(dtype), torch.randn(19)

    def call(x: Tensor) -> Any:
        return getattr(functional, name)(x)

    truth = run(functional.entropy_from_logits, logits.double(), weights=weights)
    theirs = run(call, logits, weights=weights)
    with deeprec.patch("verl"):
        ours = run(call, logits, weights=weights)
        assert f"{name} -> deeprec.gather_logprobs: 1 calls" in explain()
    assert_no_worse(ours, theirs, truth)


def head(lead: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((*lead, 48), (333, 48))
    inputs = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    ids = torch.randint(333, lead, generator=generator)
    return inputs, ids, torch.randn(lead, generator=generator)


def dense(ids: Tensor) -> Any:
    def call(hidden: Tensor, weight: Tensor) -> Any:
        logprobs = (hidden @ weight.T / 0.8).log_softmax(-1)
        chosen = logprobs.gather(-1, ids[..., None])[..., 0]
        return chosen, -(logprobs.exp() * logprobs).sum(-1)

    return call


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead", [(41,), (2, 13)])
def test_the_fused_head_of_ppo(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, ids, weights = head(lead, dtype)

    def call(hidden: Tensor, weight: Tensor) -> Any:
        return fused.FusedLinearForPPO(chunk_size=16)(hidden, weight, ids, temperature=0.8)

    theirs = run(call, *inputs, weights=weights)
    with deeprec.patch("verl"):
        ours = run(call, *inputs, weights=weights)
        assert "FusedLinearForPPOFunction -> deeprec.linear_logprobs: 1 calls" in explain()
    assert_no_worse(ours, theirs, run(dense(ids), *[x.double() for x in inputs], weights=weights))


def test_the_triton_head_runs_without_triton() -> None:
    inputs, ids, weights = head((2, 13), torch.float32)

    def call(hidden: Tensor, weight: Tensor) -> Any:
        return kernel.linear_cross_entropy(hidden, weight, ids, 0.8)

    with deeprec.patch("verl"):
        values, entropy, *gradients = run(call, *inputs, weights=weights.flatten())
        assert "linear_cross_entropy -> deeprec.linear_logprobs: 1 calls" in explain()
        with pytest.raises(AssertionError, match="must be a float"):
            kernel.linear_cross_entropy(*inputs, ids, 1)
    truth = run(dense(ids), *[x.double() for x in inputs], weights=weights)
    assert values.shape == entropy.shape == (26,)  # flat, as verl's kernel returns them
    for ours, exact in zip((values, entropy, *gradients), truth, strict=True):
        torch.testing.assert_close(ours, exact.view_as(ours).float(), rtol=1e-4, atol=1e-4)


def test_what_verls_own_test_compares() -> None:
    """``tests/utils/test_linear_cross_entropy.py`` of verl (Apache 2.0), which needs a GPU there.

    Its bfloat16 inputs and its tolerances, on fewer tokens: logits path, fused head and kernel
    against plain torch, and the gradients of a random sum of log-probs and entropy.
    """
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape: int, high: float = 0.5) -> Tensor:
        return ((2 * torch.rand(shape, generator=generator) - 1) * high).bfloat16()

    hidden, weight = uniform(1, 153, 256), uniform(1999, 256)
    ids = torch.randint(1999, (1, 153), generator=generator)
    for_entropy, for_values = uniform(153), uniform(153, high=1.0)

    def plain(h: Tensor, w: Tensor) -> Any:
        logits = h[0].float() @ w.float().T / 1.5
        logprobs = logits.log_softmax(-1)
        return logprobs.gather(-1, ids[0, :, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

    def by_logits(h: Tensor, w: Tensor) -> Any:
        logits = h[0].float() @ w.float().T / 1.5
        values = functional.logprobs_from_logits(logits, ids[0], inplace_backward=False)
        return values, functional.entropy_from_logits(logits)

    def by_head(h: Tensor, w: Tensor) -> Any:
        values, entropy = fused.FusedLinearForPPO()(h.float(), w.float(), ids, temperature=1.5)
        return values[0], entropy[0]

    def by_kernel(h: Tensor, w: Tensor) -> Any:
        return kernel.linear_cross_entropy(h, w, ids, 1.5)

    def computed(call: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        values, entropy = call(*leaves)
        made = torch.autograd.grad(
            (entropy, values), leaves, (for_entropy.to(entropy.dtype), for_values.to(values.dtype))
        )
        return [values.detach(), entropy.detach(), *made]

    expected = computed(plain)
    with deeprec.patch("verl"):
        paths = {call: computed(call) for call in (by_logits, by_head, by_kernel)}
        assert explain().count(": 1 calls") == 4
    for call, made in paths.items():
        exact = call is not by_kernel
        near = [(1e-4, 1e-4)] * 2 if exact else [(1e-3, 2e-4), (5e-3, 5e-4)]
        near += [(1e-2, 1e-4)] * 2 if exact else [(2e-2, 4e-2)] * 2
        for ours, theirs, (atol, rtol) in zip(made, expected, near, strict=True):
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)
