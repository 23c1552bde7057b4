"""What TRL's own tests ask of the functions that are patched, asked with the patch on.

TRL 1.16 ships no tests with its package. These follow ``tests/test_utils.py``
(``TestSelectiveLogSoftmax``) and ``tests/test_kernels.py`` of its repository (Apache 2.0), whose
second half wants a GPU there: same inputs, same tolerances. In half precision TRL asks for the bits
of torch's ``log_softmax``, or closeness to logits in bfloat16; the patch rounds once, at the
end, so there errors against float64 are compared instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="TRL needs Python 3.11")

import trl.trainer.utils as trl
from numerics import assert_no_worse
from torch import Tensor

import deeprec
from deeprec.integrations import explain

N, H, V, CHUNK = 64, 32, 128, 32
OURS = ("log_probs", "entropy")
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _patched() -> Iterator[None]:
    torch.manual_seed(42)
    with deeprec.patch("trl"):
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("many", [0, 1, 8])
def test_selective_log_softmax(dtype: torch.dtype, many: int) -> None:
    logits = torch.randn(4, 32, 1024, dtype=dtype)
    ids = torch.randint(1024, (4, 32, many) if many else (4, 32))
    wide = ids if many else ids[..., None]
    expected = logits.log_softmax(-1).gather(-1, wide).view(ids.shape)
    made = trl.selective_log_softmax(logits, ids)
    calls = 0 if dtype == torch.float64 else 1
    assert f"selective_log_softmax -> deeprec.gather_logprobs: {calls} calls" in explain()
    assert made.shape == ids.shape and made.dtype == dtype
    if dtype in HALVES:
        exact = logits.double().log_softmax(-1).gather(-1, wide).view(ids.shape)
        error, torchs = (made - exact).abs(), (expected - exact).abs()
        assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs()).all()  # rounded to nearest
        assert error.sum() < torchs.sum()
    else:
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def logits_reference(
    logits: Tensor, ids: Tensor, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    logprobs = (logits.float() / temperature).log_softmax(-1)
    values = logprobs.gather(-1, ids[..., None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    if mask is not None:
        values, entropy = values.masked_fill(~mask, 0.0), entropy.masked_fill(~mask, 0.0)
    return values, entropy


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "value_weight, entropy_weight, masked",
    [(2.0, 0.0, True), (0.0, 0.5, True), (2.0, 0.5, True), (2.0, 0.5, False)],
)
def test_slices_masks_and_a_result_changed_in_place(
    dtype: torch.dtype, value_weight: float, entropy_weight: float, masked: bool
) -> None:
    base = torch.randn(2, 5, 2053, dtype=dtype)
    base[..., :1024].add_(20)
    base[..., 1024:2048].sub_(20)
    ids = torch.randint(2053, (2, 5))[:, 1:4]
    ids[0, 0] = 2052
    rows = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]], dtype=torch.bool)[:, 1:4]
    mask = rows if masked else None

    def gradient(function: object) -> tuple[Tensor, Tensor, Tensor]:
        leaf = base.clone().requires_grad_()
        values, entropy = function(leaf[:, 1:4])  # type: ignore[operator]
        values[0, 2] = 0.0
        (value_weight * values.sum() + entropy_weight * entropy.sum()).backward()
        assert leaf.grad is not None
        return values.detach(), entropy.detach(), leaf.grad

    ours = gradient(
        lambda x: trl.selective_log_softmax_and_entropy(x, ids, temperature=0.7, row_mask=mask)
    )
    theirs = gradient(lambda x: logits_reference(x, ids, 0.7, mask))
    assert "selective_log_softmax_and_entropy -> deeprec.gather_logprobs: 1 calls" in explain()
    # On a CPU the function keeps the dtype of the logits; on a GPU TRL's kernel gives float32.
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, other.to(dtype), **near)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-3, atol=1e-3)


def head(*wanted: bool, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias of a head, those ``wanted`` with gradients; and labels."""
    shapes = ((N, H), (V, H), (V,))
    leaves = [torch.randn(*shape, dtype=dtype) for shape in shapes[: len(wanted)]]
    for leaf, want in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    return leaves, torch.randint(V, (N,))


def scored(
    leaves: list[Tensor], labels: Tensor, temperature: float = 1.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    hidden, weight, *bias = leaves
    values, entropy, *_ = trl._ChunkedLogProbFunction.apply(
        hidden, weight, bias[0] if bias else None, labels, temperature, CHUNK, None, scale, OURS
    )
    assert re.search(r"ChunkedLogProbFunction -> deeprec.linear_logprobs: [1-9]", explain())
    return values, entropy


def dense(
    leaves: list[Tensor], labels: Tensor, temperature: float = 1.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    hidden, weight, *bias = leaves
    logits = hidden @ weight.T + (bias[0] if bias else 0)
    return logits_reference(logits.float() * scale, labels, temperature, None)


def gradients(leaves: list[Tensor], loss: Tensor) -> list[Tensor | None]:
    loss.backward()
    made = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return made


def assert_alike(leaves: list[Tensor], mine: Tensor, other: Tensor, tolerance: float) -> None:
    ours, theirs = gradients(leaves, mine), gradients(leaves, other)
    for leaf, a, b in zip(leaves, ours, theirs, strict=True):
        assert (a is None) == (b is None) == (not leaf.requires_grad)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature, scale", [(1.0, 1.0), (0.7, 1.0), (0.7, 0.5)])
def test_the_head_forward_and_backward(temperature: float, scale: float) -> None:
    leaves, labels = head(True, True)
    ours, theirs = (f(leaves, labels, temperature, scale) for f in (scored, dense))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    assert_alike(leaves, ours[0].sum(), theirs[0].sum(), 1e-5)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_and_log_probs_accumulate(weights: tuple[float, float], temperature: float) -> None:
    leaves, labels = head(True, True)
    losses = [
        (weights[0] * values + weights[1] * entropy).sum()
        for values, entropy in (f(leaves, labels, temperature) for f in (scored, dense))
    ]
    assert_alike(leaves, *losses, 1e-4)


def both(leaves: list[Tensor], labels: Tensor, function: object) -> list[Tensor]:
    """Values and entropy of the head, and the gradients of a sum of them."""
    values, entropy = function(leaves, labels, 0.7)  # type: ignore[operator]
    made = gradients(leaves, (2.0 * values + 0.5 * entropy).sum())
    return [values.detach(), entropy.detach(), *(x for x in made if x is not None)]


def exactly(leaves: list[Tensor], labels: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def function(leaves: list[Tensor], labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        hidden, weight, *bias = leaves
        logits = (hidden @ weight.T + (bias[0] if bias else 0)) / temperature
        logprobs = logits.log_softmax(-1)
        values = logprobs.gather(-1, labels[:, None])[:, 0]
        return values, -(logprobs.exp() * logprobs).sum(-1)

    return both(leaves, labels, function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_with_a_bias(dtype: torch.dtype) -> None:
    leaves, labels = head(True, True, True, dtype=dtype)
    ours, theirs = (both(leaves, labels, function) for function in (scored, dense))
    assert_no_worse(ours, theirs, exactly(leaves, labels))


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False,) * 2 + (True,)]
)
def test_frozen_parts_of_the_head_get_no_gradients(wanted: tuple[int, ...]) -> None:
    leaves, labels = head(*map(bool, wanted))
    assert_alike(leaves, scored(leaves, labels)[0].sum(), dense(leaves, labels)[0].sum(), 1e-5)


def test_hidden_states_in_bfloat16_under_a_float32_weight() -> None:
    (hidden, weight), labels = head(True, True)
    leaves = [hidden.detach().bfloat16().requires_grad_(), weight]
    ours = both(leaves, labels, scored)
    theirs = both(leaves, labels, lambda x, *rest: dense([x[0], x[1].to(x[0].dtype)], *rest))
    assert_no_worse(ours, theirs, exactly(leaves, labels))


def test_autocast_gradients_do_not_see_discarded_bits() -> None:
    hidden = torch.linspace(1.0, 2.0, N * H).view(N, H).bfloat16().float()
    weight, labels = torch.randn(V, H), torch.randint(V, (N,))
    results = []
    for moved in (0.0, 1e-4):
        leaves = [(hidden + moved).requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            values, _ = scored(leaves, labels)
        values.sum().backward()
        results.append((values.detach(), leaves[1].grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]
