"""What only the C++ kernels promise: every instruction set, determinism, no logits in memory."""

import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from layouts import check_layouts
from opchecks import check_gather, check_linear
from sharded_head import train_sharded

from deeprec import _C, AllowedTokens, gather_logprobs, linear_logprobs

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def head(rows, size, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, size, generator=generator) * 0.3).to(dtype)
    return hidden, weight, torch.randint(0, vocabulary, (rows,), generator=generator)


def run(hidden, weight, ids, allowed=None, backend="cpu"):
    """Values, entropy and both gradients of a fixed function of them."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    values, entropy = linear_logprobs(
        hidden, weight, ids, allowed=allowed, entropy=True, backend=backend
    )
    (values.sum() - 0.3 * entropy.sum()).backward()
    return values.detach(), entropy.detach(), hidden.grad, weight.grad


def half_restricted(ids, vocabulary):
    return AllowedTokens.from_lists(
        [None if r % 2 else {int(i), *range(r % 7, vocabulary, 9)} for r, i in enumerate(ids)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_on_every_isa(isa, dtype):
    logits = (torch.randn(5, 4133) * 4).to(dtype)
    ids = torch.randint(0, 4133, (5, 2))
    truth = logits.double().log_softmax(-1)
    leaf = logits.clone().requires_grad_()
    values, entropy = gather_logprobs(leaf, ids, entropy=True, backend="cpu")
    torch.testing.assert_close(values.double(), truth.gather(-1, ids), atol=2e-6, rtol=2e-7)
    torch.testing.assert_close(
        entropy.double(), -(truth.exp() * truth).sum(-1), atol=2e-6, rtol=1e-6
    )
    (gradient,) = torch.autograd.grad(values[:, 0].sum(), leaf)
    expected = torch.nn.functional.one_hot(ids[:, 0], 4133) - truth.exp()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gradient.double(), expected, atol=1e-7, rtol=tolerance)


def test_exp_error_bound(isa):
    # In the row [0, x] the gradient of the first log-prob in x is -exp(x) / (1 + exp(x)).
    x = torch.linspace(-80, 0, 20_001)
    logits = torch.stack([torch.zeros_like(x), x], -1).requires_grad_()
    values = gather_logprobs(logits, torch.zeros(len(x), dtype=torch.long), backend="cpu")
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    expected = -torch.sigmoid(x.double())
    error = (gradient[:, 1].double() / expected - 1).abs().max()
    # 2^-22 of exp, and one rounding each of the sum, its reciprocal and the product
    assert error < 2**-22 + 3 * 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 100, 600), (33, 64, 257), (40, 700, 2000)])
def test_linear_on_every_isa_is_as_good_as_torch(isa, dtype, shape):
    hidden, weight, ids = head(*shape, dtype)
    truth = run(hidden.double(), weight.double(), ids, backend="reference")
    ours = run(hidden, weight, ids)

    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    logp = torch.nn.functional.linear(h, w).log_softmax(-1)
    values, entropy = logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    (values.sum() - 0.3 * entropy.sum()).backward()
    peer = values.detach(), entropy.detach(), h.grad, w.grad

    for got, other, expected, factor in zip(ours, peer, truth, (2, 2, 3, 3), strict=True):
        error = (got.double() - expected).abs().max()
        assert error <= factor * (other.double() - expected).abs().max()
    # In bf16 torch rounds its logits, and is no measure of values that are computed in float.
    for got, expected in zip(ours[:2], truth[:2], strict=True):
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(isa, threads, dtype):
    hidden, weight, ids = head(300, 70, 700, dtype)
    allowed = half_restricted(ids, 700)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(hidden, weight, ids, allowed))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_split_changes_no_value_and_no_hidden_gradient(isa, dtype):
    hidden, weight, ids = head(150, 70, 700, dtype)
    allowed = half_restricted(ids, 700)
    whole = run(hidden, weight, ids, allowed)
    for start, stop in ((0, 1), (1, 40), (40, 150)):
        rows = slice(start, stop)
        part = run(hidden[rows], weight, ids[rows], allowed[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(part[:3], whole[:3], strict=True))


def test_masked_and_restricted_rows_leave_the_others_alone(isa):
    hidden, weight, ids = head(90, 40, 300)
    mask = torch.arange(90) % 3 != 0
    masked = linear_logprobs(hidden, weight, ids, mask=mask, backend="cpu")
    alone = linear_logprobs(hidden[mask], weight, ids[mask], backend="cpu")
    assert torch.equal(masked[mask], alone)


def test_a_token_outside_its_permitted_ids_is_impossible(isa):
    hidden, weight, ids = head(3, 8, 20)
    allowed = AllowedTokens.from_lists([[int(i + 1) % 20] for i in ids])
    assert (linear_logprobs(hidden, weight, ids, allowed=allowed) == float("-inf")).all()


def test_restricted_rows_read_nothing_but_their_permitted_ids(isa):
    hidden, weight, ids = head(40, 16, 300)
    allowed = AllowedTokens.from_lists([{int(i), r, 299} for r, i in enumerate(ids)])
    used = torch.zeros(300, dtype=torch.bool)
    used[allowed.ids] = True
    poisoned = weight.clone()
    poisoned[~used] = float("nan")
    *expected, gradient = run(hidden, weight, ids, allowed)
    *got, poisoned_gradient = run(hidden, poisoned, ids, allowed)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(poisoned_gradient, gradient) and not gradient[~used].any()


def test_poisoned_heads_give_nan(isa):
    hidden, weight, ids = head(40, 16, 300)
    weight[7, 3] = float("nan")
    assert linear_logprobs(hidden, weight, ids, backend="cpu").isnan().all()
    bias = torch.full((300,), float("-inf"))
    clean = head(40, 16, 300)[1]
    assert linear_logprobs(hidden, clean, ids, bias=bias, backend="cpu").isnan().all()
    bias[5:] = 0
    values, entropy = linear_logprobs(
        hidden, clean, ids.clamp_min(5), bias=bias, entropy=True, backend="cpu"
    )
    kept = torch.log_softmax(hidden @ clean[5:].T, -1)
    expected = kept.gather(-1, (ids.clamp_min(5) - 5)[:, None])[:, 0]
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    assert entropy.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_no_log_prob_above_zero_in_a_million(scale):
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(62_500, 9, generator=generator) * scale
        every = torch.arange(9).expand(62_500, 9)
        assert (gather_logprobs(logits, every, backend="cpu") <= 0).all()
        hidden, weight, ids = head(62_500, 5, 9, seed=seed)
        assert (linear_logprobs(hidden * scale, weight, ids, backend="cpu") <= 0).all()


def sparse_bf16(path, size):
    """Zeros that take no memory until they are touched."""
    with open(path, "wb") as file:
        file.truncate(2 * size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)


def test_logits_beyond_two_billion_elements(tmp_path):
    rows, vocabulary = 2**15 + 8, 2**16 + 1
    logits = sparse_bf16(tmp_path / "logits", rows * vocabulary).view(rows, vocabulary)
    assert logits.numel() > 2**31
    logits[-1, ::3] = 2.0
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[-1] = True
    ids = torch.full((rows,), vocabulary - 1)
    values, entropy = gather_logprobs(logits, ids, mask=mask, entropy=True, backend="cpu")
    expected = logits[-1:].double().log_softmax(-1)
    torch.testing.assert_close(values[-1].double(), expected[0, -1], atol=2e-6, rtol=0)
    torch.testing.assert_close(
        entropy[-1].double(), -(expected.exp() * expected).sum(), atol=2e-6, rtol=0
    )


def test_a_row_and_a_head_beyond_two_billion_elements(tmp_path):
    # Constrained rows touch only the permitted ids, so nothing else of the file is read.
    vocabulary = 2**31 + 64
    last = vocabulary - 1
    logits = sparse_bf16(tmp_path / "long", vocabulary).view(1, vocabulary)
    logits[0, last] = 1.0
    allowed = AllowedTokens.from_lists([[5, last - 1, last]])
    values = gather_logprobs(logits, torch.tensor([last]), allowed=allowed, backend="cpu")
    expected = torch.tensor([0.0, 0.0, 1.0]).log_softmax(-1)[-1:]
    torch.testing.assert_close(values, expected)
    head = logits.view(-1)[: 2**25 * 64].view(2**25, 64)
    head[-1] = 0.5
    allowed = AllowedTokens.from_lists([[5, 2**25 - 1]])
    ids = torch.tensor([2**25 - 1])
    hidden = torch.full((1, 64), 0.125, dtype=torch.bfloat16)
    values = linear_logprobs(hidden, head, ids, allowed=allowed, backend="cpu")
    torch.testing.assert_close(values, torch.tensor([0.0, 4.0]).log_softmax(-1)[-1:])


def adversarial(name, rows=6, vocabulary=2000):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    ids = torch.randint(0, vocabulary // 2, (rows,), generator=generator) * 2 + 1
    if name == "large":
        logits *= 1e4 / 3
    elif name == "minus_inf":
        logits[:, ::2] = float("-inf")
    elif name == "one_hot":
        logits = torch.zeros(rows, vocabulary)
        logits[:, 17] = torch.linspace(1, 1e4, rows)
    elif name == "uniform":
        logits = torch.full((rows, vocabulary), -7.3)
    else:
        logits = torch.randn(2, 1_000_000, generator=generator)
        ids = torch.tensor([3, 999_999])
    return logits, ids


@pytest.mark.parametrize("name", ["large", "minus_inf", "one_hot", "uniform", "long"])
def test_adversarial_gradients_are_as_good_as_torch(isa, name):
    logits, ids = adversarial(name)

    def gradient(dtype, op):
        x = logits.to(dtype).requires_grad_()
        return torch.autograd.grad(op(x).sum(), x)[0].double()

    def log_softmax(x):
        return x.log_softmax(-1).gather(-1, ids[:, None])

    truth = gradient(torch.float64, log_softmax)
    ours = gradient(torch.float32, lambda x: gather_logprobs(x, ids, backend="cpu"))
    theirs = gradient(torch.float32, log_softmax)
    rounding = truth.abs().max() * 2**-24
    assert (ours - truth).abs().max() <= 3 * max((theirs - truth).abs().max(), rounding)
    assert ours.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_heads_of_a_million_tokens_and_of_huge_logits(isa, scale):
    hidden, weight, ids = head(3, 2, 1_000_000 if scale == 1.0 else 3000)
    hidden *= scale
    values, entropy = linear_logprobs(hidden, weight, ids, entropy=True, backend="cpu")
    # The products of two numbers are exact in double and are rounded once or twice in float.
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    expected = logp.gather(-1, ids[:, None])[:, 0]
    peer = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    rounding = expected.abs().max() * 2**-24
    assert (values - expected).abs().max() <= 2 * max((peer - expected).abs().max(), rounding)
    expected_entropy = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_hidden_state_spoils_its_row_alone(isa, poison):
    hidden, weight, ids = head(40, 16, 300)
    hidden[3, 5] = poison
    values, entropy = linear_logprobs(hidden, weight, ids, entropy=True, backend="cpu")
    assert values[3].isnan() and entropy[3].isnan()
    others = torch.arange(40) != 3
    assert values[others].isfinite().all() and entropy[others].isfinite().all()


def test_asking_for_entropy_changes_no_value(isa):
    hidden, weight, ids = head(40, 16, 5000)
    logits = hidden @ weight.T
    for op, arguments in (
        (gather_logprobs, (logits, ids)),
        (linear_logprobs, (hidden, weight, ids)),
    ):
        values, _ = op(*arguments, entropy=True, backend="cpu")
        assert torch.equal(values, op(*arguments, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_odd_addresses_change_nothing(isa, dtype):
    check_layouts("cpu", dtype)


def test_strided_and_transposed_heads():
    hidden, weight, ids = head(20, 48, 300)
    wide = torch.zeros(300, 60)
    wide[:, :48] = weight
    expected = linear_logprobs(hidden, weight, ids, backend="cpu")
    assert torch.equal(linear_logprobs(hidden, wide[:, :48], ids, backend="cpu"), expected)
    turned = weight.T.contiguous().T
    assert torch.equal(linear_logprobs(hidden, turned, ids, backend="cpu"), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("check", [check_gather, check_linear])
def test_opcheck(check):
    check("cpu")


def test_inductor_generates_code_around_them():
    hidden, weight, ids = head(6, 8, 20)
    mask = torch.arange(6) != 2

    def loss(h, w):
        h = torch.tanh(h) * 2
        values, entropy = linear_logprobs(h, w, ids, mask=mask, entropy=True)
        chosen = gather_logprobs((h @ w.T).float() + 1, ids, mask=mask)
        return (values.exp() * 2 + entropy - chosen).sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="inductor")):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        value = run(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


MEMORY = """
import torch
from deeprec import linear_logprobs
torch.set_num_threads(1)
rows, size, vocabulary = 512, 64, 40_000
hidden = torch.randn(rows, size, requires_grad=True)
weight = torch.randn(vocabulary, size, requires_grad=True)
ids = torch.randint(0, vocabulary, (rows,))
linear_logprobs(hidden[:32], weight[:64], ids[:32] % 64).sum().backward()
hidden.grad = weight.grad = None
# Not ru_maxrss, which starts at the size of the process that launched this one.
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
open("/proc/self/clear_refs", "w").write("5")  # forget what imports took
before = peak()
linear_logprobs(hidden, weight, ids).sum().backward()
print((peak() - before) * 1024 - weight.grad.nbytes - hidden.grad.nbytes)
"""


def test_logits_are_never_in_memory():
    extra = int(subprocess.check_output([sys.executable, "-c", MEMORY], text=True))
    logits = 512 * 40_000 * 4
    assert extra < logits / 5


def test_fsdp2_wrapped_head(tmp_path):
    mp.spawn(train_sharded, (2, f"file://{tmp_path}/store"), nprocs=2)
