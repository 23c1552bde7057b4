"""TRL with the patch on: the same signatures, shapes and dtypes, errors no larger than its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from numerics import FLOATS, assert_no_worse, logits_and_ids, run
from torch import Tensor

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="TRL needs Python 3.11")

import trl.experimental.cpo.cpo_trainer as user_of_selective
import trl.trainer.utils as trl
from transformers import Qwen2Config, Qwen2ForCausalLM

import deeprec
from deeprec.integrations import explain

ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def _unpatched_afterwards() -> Iterator[None]:
    yield
    deeprec.unpatch()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "lead, many, masked", [((3, 5), 0, True), ((7,), 0, True), ((3, 5), 4, False)]
)
def test_selective_log_softmax(
    dtype: torch.dtype, temperature: float, lead: tuple[int, ...], many: int, masked: bool
) -> None:
    logits, ids = logits_and_ids(lead, 507, many)
    logits = logits.to(dtype)
    mask = torch.rand(lead, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2))

    def call(x: Tensor) -> Any:
        return trl.selective_log_softmax(x, ids, temperature, row_mask=mask)

    truth = run(call, logits.double(), weights=weights)
    theirs = run(call, logits, weights=weights)
    with deeprec.patch("trl"):
        ours = run(call, logits, weights=weights)
        assert "selective_log_softmax -> deeprec.gather_logprobs: 1 calls" in explain()
    assert_no_worse(ours, theirs, truth)


def test_a_mask_of_every_token_and_of_other_dtypes() -> None:
    logits, ids = logits_and_ids((2, 3), 50, many=4)
    mask = torch.arange(24).view(2, 3, 4) % 3
    theirs = trl.selective_log_softmax(logits, ids, row_mask=mask)
    theirs_rows = trl.selective_log_softmax(logits, ids[..., 0], row_mask=mask[..., 0])
    with deeprec.patch("trl"):
        ours = trl.selective_log_softmax(logits, ids, row_mask=mask)
        rows = trl.selective_log_softmax(logits, ids[..., 0], row_mask=mask[..., 0])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(rows, theirs_rows)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("entropy_grad", [True, False])
def test_log_prob_and_entropy(dtype: torch.dtype, entropy_grad: bool) -> None:
    logits, ids = logits_and_ids((2, 9), 300)
    logits = logits.to(dtype)
    mask = (torch.arange(18).view(2, 9) % 4 > 0).int()
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2))

    def call(x: Tensor) -> Any:
        return trl.selective_log_softmax_and_entropy(x, ids, entropy_grad, 1.3, mask)

    truth = run(call, logits.double(), weights=weights)
    theirs = run(call, logits, weights=weights)
    with deeprec.patch("trl"):
        ours = run(call, logits, weights=weights)
        assert call(logits.requires_grad_())[1].requires_grad is entropy_grad
    assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("dtype", FLOATS)
def test_entropy(dtype: torch.dtype) -> None:
    logits = logits_and_ids((300,), 129)[0].to(dtype)
    weights = torch.randn(300, generator=torch.Generator().manual_seed(2))
    truth = run(trl.entropy_from_logits, logits.double(), weights=weights)
    theirs = run(trl.entropy_from_logits, logits, weights=weights)
    with deeprec.patch("trl"):
        ours = run(trl.entropy_from_logits, logits, weights=weights)
    assert_no_worse(ours, theirs, truth)


def linear_head(
    outputs: tuple[str, ...], *, softcap: float | None = None, scale: float = 1.0, chunk: int = 100
) -> Callable[..., Any]:
    targets = torch.randint(333, (41,), generator=torch.Generator().manual_seed(4))

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        made = trl._ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, 0.8, chunk, softcap, scale, outputs
        )
        assert len(made) == 5
        return made

    return call


def linear_inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((41, 48), (333, 48), (333,))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_fused_head(dtype: torch.dtype, scale: float) -> None:
    inputs, call = linear_inputs(dtype), linear_head(("log_probs", "entropy"), scale=scale)
    weights = torch.randn(41, generator=torch.Generator().manual_seed(2))
    with deeprec.patch("trl"):
        ours = run(call, *inputs, weights=weights)
        assert "ChunkedLogProbFunction -> deeprec.linear_logprobs: 1 calls" in explain()
    theirs = run(call, *inputs, weights=weights)
    truth = dense_head(*[x.double() for x in inputs], scale=scale, weights=weights)
    assert_no_worse(ours, theirs, truth)


def dense_head(
    hidden: Tensor, weight: Tensor, bias: Tensor, *, scale: float, weights: Tensor
) -> list[Tensor]:
    """TRL's own head computes in float32 whatever comes in: the truth is written out here."""
    targets = torch.randint(333, (41,), generator=torch.Generator().manual_seed(4))

    def call(h: Tensor, w: Tensor, b: Tensor) -> Any:
        logprobs = ((h @ w.T + b) * scale / 0.8).log_softmax(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

    return run(call, hidden, weight, bias, weights=weights)


def test_the_fused_head_under_autocast() -> None:
    inputs, call = linear_inputs(torch.float32), linear_head(("log_probs", "entropy"))
    weights = torch.randn(41, generator=torch.Generator().manual_seed(2))

    def under_autocast(*leaves: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return call(*leaves)

    theirs = run(under_autocast, *inputs, weights=weights)
    with deeprec.patch("trl"):
        ours = run(under_autocast, *inputs, weights=weights)
    truth = dense_head(*[x.double() for x in inputs], scale=1.0, weights=weights)
    assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"softcap": 30.0}, "softcapped logits"),
        ({"scale": -1.0}, "logits scaled by -1.0"),
        ({"outputs": ALL_OUTPUTS}, "asked for is_top1, log_sum_sq_probs, mean_logits"),
    ],
)
def test_what_the_head_passes_on(changes: dict[str, Any], reason: str) -> None:
    call = linear_head(**{"outputs": ("log_probs",), **changes})
    inputs, weights = linear_inputs(torch.float32), torch.ones(41)
    theirs = run(call, *inputs, weights=weights)
    with deeprec.patch("trl"):
        ours = run(call, *inputs, weights=weights)
        assert f"passed on 1 times: {reason}" in explain()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_float64_stays_with_trl() -> None:
    logits, ids = logits_and_ids((2, 3), 40)
    expected = trl.selective_log_softmax(logits.double(), ids)
    with deeprec.patch("trl"):
        assert torch.equal(trl.selective_log_softmax(logits.double(), ids), expected)
        assert "passed on 1 times: no kernel for torch.float64 on cpu" in explain()


def test_trainers_that_imported_by_value_are_patched() -> None:
    before = trl.selective_log_softmax.__code__
    with deeprec.patch("trl"):
        assert user_of_selective.selective_log_softmax is trl.selective_log_softmax
        assert trl.selective_log_softmax.__code__ is not before
        import trl.experimental.orpo.orpo_trainer as later

        assert later.selective_log_softmax is trl.selective_log_softmax
    for module in (trl, user_of_selective, later):
        assert module.selective_log_softmax.__code__ is before


def test_bad_input_is_refused_as_before() -> None:
    logits, ids = logits_and_ids((2, 3), 40)
    with deeprec.patch("trl"):
        with pytest.raises(ValueError, match="temperature"):
            trl.selective_log_softmax(logits, ids, temperature=0.0)
        with pytest.raises(IndexError):
            trl.selective_log_softmax(logits, ids + 40)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_a_fused_head_trains_the_same(tied: bool) -> None:
    """Prompt positions are ignored, and one row is ignored altogether."""
    results = []
    for patched in (False, True):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        model = Qwen2ForCausalLM(config)
        ids = torch.randint(300, (3, 12))
        labels = ids.clone()
        labels[:, :5] = -100
        labels[1] = -100
        if patched:
            deeprec.patch("trl")
        trl.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        for _ in range(3):
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
            (out.loss - 0.1 * out.entropy.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen += [out.log_probs.detach(), out.entropy.detach(), out.label_mask]
        if patched:
            assert "ChunkedLogProbFunction -> deeprec.linear_logprobs: 3 calls" in explain()
        results.append(seen)
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
