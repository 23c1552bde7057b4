"""Token log-probs: from logits and through a linear head, against every fused or plain peer.

Errors are the largest against float64. Memory is the growth of the peak resident set in a process
of its own, beyond inputs and returned gradients. A peer is left out of shapes where it would need
more than LOGITS_BYTES for one copy of the logits, or where a call takes many seconds; those that
compile first, up to a minute a shape and dtype, out of all but COMPILED.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from harness import Table, forget_peak, peak_megabytes
from logprob_peers import HOLDS_LOGITS, Peer, gather_peers, linear_peers

from deeprec import gather_logprobs, linear_logprobs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# MovieLens-1M, Amazon Video Games, SmolLM2, Qwen2.5.
VOCABULARIES = (3668, 25_612, 49_152, 151_936)
ROWS = (512, 2048, 8192)
WIDTHS = (256, 576, 896)
HEADLINE = (2048, 576, 49_152)
SHORT = (512, 256, 3668)
COMPILED = ((2048, 576, 3668), HEADLINE)
# Rows whose float64 truth is computed: enough to find the error, little enough to be quick.
CHECKED = 64
LOGITS_BYTES = 13 * 10**8  # peers hold three or four copies
# Multiply-adds counted as two, forward: up to the first every peer runs, up to the second torch.
EVERY_PEER, TORCH_ONLY = 30e9, 400e9
ONCE = 130e9  # from so many on a call takes seconds, and is made once


def outcome(peer: Peer, *arguments: Tensor) -> Tensor | str:
    """Log-probs, or why a peer does not run here: those are left out and named."""
    try:
        return peer(*arguments).detach()
    except Exception as error:
        return type(error).__name__


def backward(peer: Peer, leaves: list[Tensor], ids: Tensor) -> Callable[[], Tensor | None]:
    def run() -> Tensor | None:
        for leaf in leaves:
            leaf.grad = None
        peer(*leaves, ids).sum().backward()
        return leaves[0].grad

    return run


def measure(
    table: Table,
    op: str,
    what: Mapping[str, Any],
    ours: Peer,
    peers: Mapping[str, Peer],
    arguments: tuple[list[Tensor], Tensor, Tensor, Tensor],
    once: bool = False,
    **cost: Any,
) -> None:
    """Rows for forward and forward + backward of one shape, and one of errors.

    ``arguments`` are the inputs, token ids and, in float64 and of the first CHECKED rows, log-probs
    and the gradients in the first input.
    """
    inputs, ids, truth, slope = arguments
    everyone = {"deeprec": ours, **peers}
    outcomes = {name: outcome(peer, *inputs, ids) for name, peer in everyone.items()}
    error = {
        name: float((values[: len(truth)].double() - truth).abs().max())
        for name, values in outcomes.items()
        if isinstance(values, Tensor)
    }
    # Roundings of the largest log-prob: one each for the logit, the log-sum-exp and their
    # difference, and one for the sums. Up to 2.6 are seen, of torch's float32 up to 9.3 in logits
    # of 151,936; torch's bf16 logits alone are 10,000 off, so peers are no measure.
    assert error["deeprec"] <= 4 * float(truth.abs().max()) * 2**-24
    cells = {n: f"{error[n]:.1e}" if n in error else outcomes[n] for n in everyone}
    table.facts(f"{op} largest error", what, cells)

    alive = {name: peer for name, peer in peers.items() if name in error}
    result = table.row(
        op,
        {**what, "pass": "forward"},
        ours={"deeprec": lambda: ours(*inputs, ids)},
        peers={name: (lambda p=peer: p(*inputs, ids)) for name, peer in alive.items()},
        once=once,
        **cost,
    )
    result["notes"]["fastest peer"] = result.get("fastest_peer", "none ran")
    leaves = [x.clone().requires_grad_() for x in inputs]
    ours_backward, made = backward(ours, leaves, ids), {}

    def keeping_gradient() -> None:
        made["gradient"] = ours_backward()

    result = table.row(
        op,
        {**what, "pass": "+ backward"},
        ours={"deeprec": keeping_gradient},
        peers={name: backward(peer, leaves, ids) for name, peer in alive.items()},
        once=once,
    )
    result["notes"]["fastest peer"] = result.get("fastest_peer", "none ran")
    # Sums over the vocabulary in float32: up to 21 roundings of the largest are seen; and one of
    # the result, in its dtype.
    gradient = made["gradient"]
    near = (128 * 2**-24 + torch.finfo(gradient.dtype).eps / 2) * float(slope.abs().max())
    torch.testing.assert_close(gradient[: len(slope)].double(), slope, rtol=0, atol=near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("rows", ROWS)
def test_gather_logprobs(table: Table, rows: int, vocabulary: int, dtype: str) -> None:
    if table.short and (rows, vocabulary) != (SHORT[0], SHORT[2]):
        pytest.skip("takes too long for --short")
    if rows * vocabulary * DTYPES[dtype].itemsize > LOGITS_BYTES:
        pytest.skip("the logits alone are too large")
    torch.manual_seed(0)
    logits = torch.randn(rows, vocabulary).mul_(3).to(DTYPES[dtype])
    ids = torch.randint(0, vocabulary, (rows,))
    logprobs = logits[:CHECKED].double().log_softmax(-1)
    truth = logprobs.gather(-1, ids[:CHECKED, None])[:, 0]
    slope = F.one_hot(ids[:CHECKED], vocabulary) - logprobs.exp()
    measure(
        table,
        "gather_logprobs",
        {"T": rows, "V": vocabulary, "dtype": dtype},
        gather_logprobs,
        gather_peers(compiled=(rows, vocabulary) == (2048, 49_152)),
        ([logits], ids, truth, slope),
        operations=rows * vocabulary,
        unit="exp_sum",
        bytes_read=logits.nbytes,
    )


def peers_at(rows: int, size: int, vocabulary: int, dtype: str) -> dict[str, Peer]:
    """The peers a shape is measured with; see the top of this file."""
    work = 2.0 * rows * size * vocabulary
    fits = rows * vocabulary * DTYPES[dtype].itemsize <= LOGITS_BYTES
    if work > TORCH_ONLY:
        peers = {}
    elif work > EVERY_PEER and (rows, size, vocabulary) != HEADLINE:
        peers = {"torch": linear_peers(compiled=False)["torch"]}
    else:
        peers = linear_peers(compiled=(rows, size, vocabulary) in COMPILED)
    return {name: peer for name, peer in peers.items() if fits or name not in HOLDS_LOGITS}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_logprobs(table: Table, rows: int, size: int, vocabulary: int, dtype: str) -> None:
    if table.short and (rows, size, vocabulary) != SHORT:
        pytest.skip("takes too long for --short")
    torch.manual_seed(0)
    hidden = torch.randn(rows, size).to(DTYPES[dtype])
    weight = torch.randn(vocabulary, size).mul_(3 * size**-0.5).to(DTYPES[dtype])
    ids = torch.randint(0, vocabulary, (rows,))
    exact = weight.double()
    logprobs = (hidden[:CHECKED].double() @ exact.T).log_softmax(-1)
    truth = logprobs.gather(-1, ids[:CHECKED, None])[:, 0]
    slope = exact[ids[:CHECKED]] - logprobs.exp() @ exact
    del exact, logprobs
    measure(
        table,
        "linear_logprobs",
        {"T": rows, "H": size, "V": vocabulary, "dtype": dtype},
        linear_logprobs,
        peers_at(rows, size, vocabulary, dtype),
        ([hidden, weight], ids, truth, slope),
        once=2.0 * rows * size * vocabulary > ONCE,
        operations=2.0 * rows * size * vocabulary,
        unit="fp32_fma" if dtype == "fp32" else "bf16_dot",
    )


def megabytes_of(name: str, rows: int, size: int, vocabulary: int, dtype: str) -> float:
    """Peak growth of forward + backward, run in this process, which does nothing else."""
    peer = linear_logprobs if name == "deeprec" else linear_peers()[name]

    def problem(rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        # Drawn in its own dtype, so that no larger temporary has raised the peak already.
        hidden = torch.randn(rows, size, dtype=DTYPES[dtype], requires_grad=True)
        weight = torch.randn(vocabulary, size, dtype=DTYPES[dtype], requires_grad=True)
        return hidden, weight, torch.randint(0, vocabulary, (rows,))

    # Code is loaded and thread pools are built on a small problem first.
    peer(*problem(64, 64)).sum().backward()
    hidden, weight, ids = problem(rows, vocabulary)

    forget_peak()
    before = peak_megabytes()
    peer(hidden, weight, ids).sum().backward()
    returned = hidden.nbytes + weight.nbytes
    return peak_megabytes() - before - returned / 2**20


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory(table: Table, dtype: str) -> None:
    rows, size, vocabulary = SHORT if table.short else HEADLINE
    megabytes = {}
    for name in ("deeprec", *linear_peers(not table.short)):
        arguments = json.dumps([name, rows, size, vocabulary, dtype])
        answer = subprocess.run(
            [sys.executable, __file__, arguments], capture_output=True, text=True, check=False
        )
        done = answer.returncode == 0
        megabytes[f"{name} MB"] = f"{float(answer.stdout):.0f}" if done else "does not run"
    what = {"T": rows, "H": size, "V": vocabulary, "dtype": dtype}
    table.facts("linear_logprobs extra memory", what, megabytes)
    if not table.short:
        assert float(megabytes["deeprec MB"]) <= 64


if __name__ == "__main__":
    print(megabytes_of(*json.loads(sys.argv[1])))
