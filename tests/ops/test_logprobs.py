"""gather_logprobs: values, gradients and refusals of every backend against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprec import AllowedTokens, backends, gather_logprobs

BACKENDS = backends.runnable("gather_logprobs", torch.zeros(1, 1))
LISTS = [[3, 1, 5], None, [1], [2, 9], [], list(range(20))]


def truth(logits, ids, temperature=1.0, permitted=None):
    """Values [T, K] and entropy [T] in float64, written out."""
    z = logits.double() / temperature
    if permitted is not None:
        z = z.masked_fill(~permitted, float("-inf"))
    logp = z - z.logsumexp(-1, keepdim=True)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    return logp.gather(-1, ids), entropy


def case(rows=6, vocabulary=50, k=2, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=generator) * scale).to(dtype)
    return logits, torch.randint(0, vocabulary, (rows, k), generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 30.0])
def test_values_and_entropy(backend, dtype, temperature):
    logits, ids = case(vocabulary=5001, dtype=dtype)
    values, entropy = gather_logprobs(
        logits, ids, temperature=temperature, entropy=True, backend=backend
    )
    expected, expected_entropy = truth(logits, ids, temperature)
    assert values.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, atol=2e-6, rtol=2e-7)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_a_row_is_the_first_of_k(backend):
    logits, ids = case()
    one = gather_logprobs(logits, ids[:, 0], backend=backend)
    assert one.shape == (6,)
    assert torch.equal(one, gather_logprobs(logits, ids, backend=backend)[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend):
    logits, ids = case(vocabulary=300)
    allowed = AllowedTokens.from_lists(LISTS)
    ids[0], ids[2], ids[3], ids[5] = 3, 1, torch.tensor([2, 9]), 7
    permitted = allowed.mask(300)
    weights = torch.randn(6, 2), torch.randn(6)

    def gradient(dtype, run):
        x = logits.to(dtype).requires_grad_()
        values, entropy = run(x)
        loss = (values * weights[0]).sum() + (entropy * weights[1]).sum()
        return torch.autograd.grad(loss, x)[0].double()

    got = gradient(
        torch.float32,
        lambda x: gather_logprobs(
            x, ids, temperature=0.7, allowed=allowed, entropy=True, backend=backend
        ),
    )
    z = gradient(torch.float64, lambda x: masked_truth(x, ids, permitted))
    torch.testing.assert_close(got, z, atol=2e-6, rtol=1e-5)


def masked_truth(x, ids, permitted):
    """truth() with a large negative number for −inf, which float64 autograd can differentiate."""
    z = torch.where(permitted, x.double() / 0.7, -1e4)
    logp = z - z.logsumexp(-1, keepdim=True)
    return logp.gather(-1, ids), -(logp.exp() * logp).sum(-1)


def test_gradcheck_of_the_reference():
    logits, ids = case(vocabulary=20, dtype=torch.float64)
    ids[0], ids[2], ids[3] = 3, 1, 9
    mask = torch.tensor([True, True, True, True, True, False])
    ids[5] = -100
    assert torch.autograd.gradcheck(
        lambda x: gather_logprobs(
            x,
            ids,
            temperature=0.7,
            mask=mask,
            allowed=AllowedTokens.from_lists(LISTS),
            entropy=True,
            backend="reference",
        ),
        logits.requires_grad_(),
    )


def test_float64_in_float64_out():
    logits, ids = case(dtype=torch.float64)
    values = gather_logprobs(logits, ids)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, truth(logits, ids)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_are_never_read(backend):
    logits, ids = case()
    mask = torch.tensor([True, False, True, True, False, True])
    ids[~mask] = -100
    logits[~mask] = float("nan")
    logits.requires_grad_()
    values, entropy = gather_logprobs(logits, ids, mask=mask, entropy=True, backend=backend)
    (values.sum() + entropy.sum()).backward()
    assert (values[~mask] == 0).all() and (entropy[~mask] == 0).all()
    assert (logits.grad[~mask] == 0).all() and (logits.grad[mask] != 0).all()
    expected = gather_logprobs(logits[mask], ids[mask], backend=backend)
    assert torch.equal(values[mask], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_restricted_rows(backend):
    logits, ids = case()
    ids[0], ids[2], ids[3], ids[5] = 3, torch.tensor([1, 4]), 9, 7
    allowed = AllowedTokens.from_lists(LISTS)
    values, entropy = gather_logprobs(logits, ids, allowed=allowed, entropy=True, backend=backend)
    expected, expected_entropy = truth(logits, ids, permitted=allowed.mask(50))
    torch.testing.assert_close(values.double(), expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=2e-6, rtol=1e-6)
    assert values[2].tolist() == [0.0, float("-inf")], "one choice is certain, others impossible"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["large", "minus_inf", "one_hot", "uniform", "long", "tiny"])
def test_adversarial_rows_are_as_good_as_torch(backend, name):
    logits, ids = case(rows=4, vocabulary=3000)
    if name == "large":
        logits *= 1e4 / 3
    elif name == "minus_inf":
        logits[:, ::2] = float("-inf")
        ids |= 1
    elif name == "one_hot":
        logits = torch.zeros(4, 3000)
        logits[:, 17] = torch.tensor([1.0, 10.0, 20.0, 1e4])
        ids[:, 0] = 17
    elif name == "uniform":
        logits = torch.full((4, 3000), 0.1)
    elif name == "long":
        logits, ids = case(rows=2, vocabulary=1_000_000)
    else:
        logits *= 1e-20
    values, entropy = gather_logprobs(logits, ids, entropy=True, backend=backend)
    expected, expected_entropy = truth(logits, ids)
    torch_error = (logits.log_softmax(-1).gather(-1, ids).double() - expected).abs().max()
    rounding = expected.abs().max() * 2**-24
    assert (values.double() - expected).abs().max() <= 2 * max(torch_error, rounding)
    assert (values <= 0).all() and (entropy >= 0).all()
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_without_a_softmax_is_nan(backend, poison):
    logits, ids = case()
    logits[1, 7] = poison
    logits[2] = float("-inf")
    values, entropy = gather_logprobs(logits, ids, entropy=True, backend=backend)
    assert values[1:3].isnan().all() and entropy[1:3].isnan().all()
    assert values[[0, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slice_of_a_larger_tensor(backend):
    whole = torch.randn(3, 5, 40, requires_grad=True)
    ids = torch.randint(0, 30, (3, 4))
    values = gather_logprobs(whole[:, :-1, :30], ids, backend=backend)
    (gradient,) = torch.autograd.grad(values.sum(), whole)
    copy = whole[:, :-1, :30].detach().clone().requires_grad_()
    expected = gather_logprobs(copy, ids, backend=backend)
    assert torch.equal(values, expected)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), copy)
    assert torch.equal(gradient[:, :-1, :30], expected_gradient)
    assert (gradient[:, -1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_and_small_integers(backend):
    logits, ids = case()
    got = gather_logprobs(logits.numpy(), ids.numpy().astype(np.int32), backend=backend)
    assert torch.equal(got, gather_logprobs(logits, ids, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend):
    empty = torch.empty(0, 7, requires_grad=True)
    values, entropy = gather_logprobs(
        empty, torch.empty(0, dtype=torch.long), entropy=True, backend=backend
    )
    assert values.shape == entropy.shape == (0,)
    values.sum().backward()
    logits, ids = case()
    nothing = gather_logprobs(logits, ids, mask=torch.zeros(6, dtype=torch.bool), backend=backend)
    assert (nothing == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 130),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4, 1e30]),
    temperature=st.sampled_from([0.01, 0.6, 1.0, 50.0]),
    seed=st.integers(0, 10**6),
)
def test_properties(backend, rows, vocabulary, scale, temperature, seed):
    logits, ids = case(rows, vocabulary, 3, seed=seed, scale=scale)
    values, entropy = gather_logprobs(
        logits, ids, temperature=temperature, entropy=True, backend=backend
    )
    assert (values <= 0).all()
    assert ((entropy >= 0) & (entropy <= np.log(vocabulary) + 1e-5)).all()
    expected, expected_entropy = truth(logits, ids, temperature)
    # logits / temperature is itself rounded before anything else happens to it
    rounding = 2**-22 * logits.abs().max().item() / temperature
    torch.testing.assert_close(values.double(), expected, atol=3e-6 + rounding, rtol=5e-7)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend):
    logits, ids = case()
    mask = torch.tensor([True, False, True, True, False, True])

    def loss(x):
        values, entropy = gather_logprobs(x, ids, mask=mask, entropy=True, backend=backend)
        return (values.sum(-1) * 2 + entropy * 0.1).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (loss, compiled):
        x = logits.clone().requires_grad_()
        run(x).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


BAD = {
    "logits must be float": dict(logits=torch.zeros(2, 3, dtype=torch.int32)),
    "V > 0": dict(logits=torch.zeros(2, 0)),
    "token_ids must be integers": dict(token_ids=torch.zeros(2)),
    "token_ids must have shape": dict(token_ids=torch.zeros(3, dtype=torch.long)),
    "temperature must be positive": dict(temperature=0.0),
    "temperature must be positive and finite": dict(temperature=float("nan")),
    "mask must be bool": dict(mask=torch.ones(2)),
    "mask must have shape": dict(mask=torch.ones(3, dtype=torch.bool)),
    "allowed must have one row": dict(allowed=AllowedTokens.from_lists([[1]])),
    "allowed must be in": dict(allowed=AllowedTokens.from_lists([[1], [3]])),
    "token_ids must be on cpu, got meta": dict(token_ids=torch.zeros(2, device="meta").long()),
    "mask must be on cpu, got meta": dict(mask=torch.ones(2, device="meta").bool()),
    "token_ids must be in \\[0, 3\\), got 3": dict(token_ids=torch.tensor([0, 3])),
    "token_ids must be in \\[0, 3\\), got -1": dict(token_ids=torch.tensor([-1, 2])),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(backend, message):
    arguments = dict(logits=torch.zeros(2, 3), token_ids=torch.tensor([0, 1])) | BAD[message]
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        gather_logprobs(**arguments, backend=backend)


def test_unknown_backend():
    with pytest.raises(ValueError, match="no backend 'fast'"):
        gather_logprobs(*case(), backend="fast")
