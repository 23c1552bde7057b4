"""linear_logprobs: values, gradients and refusals of every backend against float64."""

import itertools

import pytest
import torch

from deeprec import AllowedTokens, backends, gather_logprobs, linear_logprobs

BACKENDS = backends.runnable("linear_logprobs", torch.zeros(1, 1), torch.zeros(1, 1), None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(rows=37, size=45, vocabulary=301, dtype=torch.float32, weight_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, size, generator=generator) * 0.3).to(weight_dtype or dtype)
    return hidden, weight, torch.randint(0, vocabulary, (rows,), generator=generator)


def some_bias(vocabulary):
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(3))


def some_allowed(ids, vocabulary):
    """Every third row unrestricted, the others 1 to 40 ids around the chosen one."""
    rows = [
        None if r % 3 == 0 else {int(i), *range(r % vocabulary, min(r + r % 41, vocabulary))}
        for r, i in enumerate(ids)
    ]
    return AllowedTokens.from_lists(rows)


def gradients(run, hidden, weight, bias, seed=1):
    """Values, entropy and the gradients of a random function of both."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    values, entropy = run(*leaves)
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(values.shape, generator=generator)
    b = torch.randn(values.shape, generator=generator)
    ((values * a).sum() + (entropy * b).sum()).backward()
    return values.detach(), entropy.detach(), [x.grad for x in leaves]


def in_double(*tensors):
    return [tensor.double() for tensor in tensors]


def check_against_double(run, hidden, weight, bias, tolerance):
    """``run(hidden, weight, bias)`` on its inputs and on the reference in float64."""
    values, entropy, grads = gradients(run, hidden, weight, bias)
    expected = gradients(lambda *x: run(*x, backend="reference"), *in_double(hidden, weight, bias))
    torch.testing.assert_close(values.double(), expected[0], atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), expected[1], atol=2e-5, rtol=1e-5)
    for got, want, leaf in zip(grads, expected[2], (hidden, weight, bias), strict=True):
        assert got.dtype == leaf.dtype
        scale = want.abs().max().clamp_min(1e-30)
        torch.testing.assert_close(got.double() / scale, want / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_values_and_gradients(backend, dtype, weight_dtype):
    hidden, weight, ids = case(dtype=dtype, weight_dtype=weight_dtype)
    bias = some_bias(len(weight))
    tolerance = 1e-5 if dtype == weight_dtype == torch.float32 else 1e-2

    def run(h, w, b, backend=backend):
        return linear_logprobs(h, w, ids, bias=b, temperature=0.8, entropy=True, backend=backend)

    check_against_double(run, hidden, weight, bias, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_and_allowed(backend, dtype):
    hidden, weight, ids = case(rows=64, dtype=dtype)
    allowed = some_allowed(ids, len(weight))
    mask = torch.arange(64) % 5 != 0
    ids[~mask] = -100
    bias = some_bias(len(weight)).to(dtype)

    def run(h, w, b, backend=backend):
        return linear_logprobs(
            h, w, ids, bias=b, mask=mask, allowed=allowed, entropy=True, backend=backend
        )

    check_against_double(run, hidden, weight, bias, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "size", "vocabulary"),
    [(1, 1, 1), (1, 7, 3), (33, 31, 257), (5, 64, 256), (70, 33, 640), (32, 32, 32)],
)
def test_odd_shapes(backend, rows, size, vocabulary):
    hidden, weight, ids = case(rows, size, vocabulary)
    bias = some_bias(vocabulary)

    def run(h, w, b, backend=backend):
        return linear_logprobs(h, w, ids, bias=b, entropy=True, backend=backend)

    check_against_double(run, hidden, weight, bias, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4])
def test_extreme_logits_are_as_good_as_torch(backend, scale):
    """All alike, all but alike, and one token that has all: certain and impossible ones asked."""
    hidden, weight, ids = case()
    ids[::2] = (hidden @ weight.T).argmax(-1)[::2]
    hidden *= scale

    def torch_s(h, w):
        return torch.log_softmax(h @ w.T, -1).gather(-1, ids[:, None])[:, 0]

    def outcome(run, *inputs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        values = run(*leaves)
        return [values.detach(), *torch.autograd.grad(values.sum(), leaves)]

    exact = outcome(torch_s, *in_double(hidden, weight))
    theirs = outcome(torch_s, hidden, weight)
    ours = outcome(lambda h, w: linear_logprobs(h, w, ids, backend=backend), hidden, weight)
    for got, their, want in zip(ours, theirs, exact, strict=True):
        own = (their - want).abs().max()
        assert (got - want).abs().max() <= 3 * own + 1e-6 * want.abs().max() + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_hidden_is_never_read(backend):
    hidden, weight, ids = case()
    mask = torch.arange(len(ids)) % 2 == 0
    hidden[~mask] = float("nan")
    ids[~mask] = -100
    hidden.requires_grad_()
    weight.requires_grad_()
    values, entropy = linear_logprobs(hidden, weight, ids, mask=mask, entropy=True, backend=backend)
    (values.sum() + entropy.sum()).backward()
    assert (values[~mask] == 0).all() and (entropy[~mask] == 0).all()
    assert (hidden.grad[~mask] == 0).all() and (hidden.grad[mask] != 0).any()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_asked_gradients(backend):
    hidden, weight, ids = case()
    for wanted in (0, 1):
        leaves = [hidden.clone(), weight.clone()]
        leaves[wanted].requires_grad_()
        linear_logprobs(*leaves, ids, backend=backend).sum().backward()
        assert leaves[wanted].grad is not None and leaves[1 - wanted].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_head_adds_both_gradients(backend):
    _, weight, ids = case()
    tied = weight.clone().requires_grad_()
    linear_logprobs(tied[ids], tied, ids, backend=backend).sum().backward()
    hidden = weight[ids].clone().requires_grad_()
    head = weight.clone().requires_grad_()
    linear_logprobs(hidden, head, ids, backend=backend).sum().backward()
    expected = head.grad.index_add(0, ids, hidden.grad)
    torch.testing.assert_close(tied.grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_gather_logprobs(backend):
    hidden, weight, ids = case()
    expected = gather_logprobs(hidden @ weight.T, ids, backend=backend)
    got = linear_logprobs(hidden, weight, ids, backend=backend)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions(backend):
    hidden, weight, ids = case(rows=12)
    flat = linear_logprobs(hidden, weight, ids, backend=backend)
    shaped = linear_logprobs(hidden.view(3, 4, -1), weight, ids.view(3, 4), backend=backend)
    assert torch.equal(shaped.view(-1), flat)


def test_gradcheck_of_the_reference():
    hidden, weight, ids = case(9, 4, 11, dtype=torch.float64)
    bias = torch.randn(11, dtype=torch.float64)
    mask = torch.arange(9) != 4
    allowed = some_allowed(ids, 11)

    def run(h, w, b):
        return linear_logprobs(
            h, w, ids, bias=b, temperature=0.7, mask=mask, allowed=allowed, entropy=True
        )

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (hidden, weight, bias)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_all_masked(backend):
    hidden, weight, ids = case()
    weight.requires_grad_()
    empty = linear_logprobs(hidden[:0], weight, ids[:0], backend=backend)
    assert empty.shape == (0,)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    nothing = linear_logprobs(hidden, weight, ids, mask=mask, backend=backend)
    (empty.sum() + nothing.sum()).backward()
    assert (nothing == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_multiplies_in_its_dtype(backend):
    hidden, weight, ids = case()
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logprobs(hidden, weight, ids, backend=backend)
    expected = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), ids, backend=backend)
    assert torch.equal(got, expected) and got.dtype == torch.float32
    got.sum().backward()
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing(backend):
    hidden, weight, ids = case()
    grads = []
    for checkpointed in (False, True):
        h = hidden.clone().requires_grad_()
        arguments = (linear_logprobs, h, weight, ids)
        if checkpointed:
            values = torch.utils.checkpoint.checkpoint(
                *arguments, backend=backend, use_reentrant=False
            )
        else:
            values = linear_logprobs(*arguments[1:], backend=backend)
        values.sum().backward()
        grads.append(h.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend):
    hidden, weight, ids = case()
    bias = some_bias(len(weight))

    def run(h, w, b):
        return linear_logprobs(h, w, ids, bias=b, entropy=True, backend=backend)

    eager = gradients(run, hidden, weight, bias)
    compiled = gradients(
        torch.compile(run, fullgraph=True, backend="aot_eager"), hidden, weight, bias
    )
    torch.testing.assert_close(eager, compiled)


BAD = {
    "hidden must be float": dict(hidden=torch.zeros(2, 4, dtype=torch.int32)),
    "weight must have shape": dict(weight=torch.zeros(3, 5)),
    "weight must have shape \\[V, H\\] with H = 4 and V > 0": dict(weight=torch.zeros(0, 4)),
    "bias must have shape": dict(bias=torch.zeros(2)),
    "bias must be float": dict(bias=torch.zeros(3, dtype=torch.long)),
    "token_ids must have shape": dict(token_ids=torch.zeros(3, dtype=torch.long)),
    "weight must be on cpu like hidden, got meta": dict(weight=torch.zeros(3, 4, device="meta")),
    "bias must be on cpu like hidden, got meta": dict(bias=torch.zeros(3, device="meta")),
    "token_ids must be on cpu, got meta": dict(token_ids=torch.zeros(2, device="meta").long()),
    "token_ids must be in \\[0, 3\\), got 3": dict(token_ids=torch.tensor([0, 3])),
    "token_ids must be in \\[0, 3\\), got -1": dict(token_ids=torch.tensor([-1, 2])),
    "temperature must be positive": dict(temperature=-1.0),
    "mask must have shape": dict(mask=torch.ones(3, dtype=torch.bool)),
    "allowed must have one row": dict(allowed=AllowedTokens.from_lists([[1]])),
    "allowed must be in": dict(allowed=AllowedTokens.from_lists([[1], [3]])),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(backend, message):
    good = dict(hidden=torch.zeros(2, 4), weight=torch.zeros(3, 4), token_ids=torch.tensor([0, 1]))
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        linear_logprobs(**good | BAD[message], backend=backend)
