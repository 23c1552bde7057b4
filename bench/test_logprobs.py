"""Token log-probs: from logits and through a linear head, against every fused or plain peer.

Errors are the largest against float64, ours and the worst peer's. Memory is the growth of the
peak resident set in a process of its own, beyond inputs and returned gradients.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from harness import Table
from logprob_peers import Peer, gather_peers, linear_peers

from deeprec import gather_logprobs, linear_logprobs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Vocabularies: MovieLens-1M, Amazon Video Games, SmolLM2, Qwen2.5.
GATHER = [(2048, 3668), (2048, 49_152), (512, 151_936)]
LINEAR = [
    (512, 256, 3668),
    (2048, 256, 3668),
    (2048, 256, 25_612),
    (2048, 576, 49_152),
    (512, 896, 151_936),
    (2048, 896, 151_936),
    (8192, 576, 49_152),
]
# Rows whose float64 truth is computed: enough to find the error, little enough to be quick.
CHECKED = 64


def fails(peer: Peer, *arguments: Tensor) -> str | None:
    """Why a peer does not run here, or None. A peer that cannot is left out and named."""
    try:
        peer(*arguments)
    except Exception as error:
        return type(error).__name__
    return None


def errors(peers: dict[str, Peer], truth: Tensor, *arguments: Tensor) -> dict[str, float]:
    return {
        name: float((peer(*arguments).double()[: len(truth)] - truth).abs().max())
        for name, peer in peers.items()
    }


def backward(peer: Peer, leaves: list[Tensor], ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        peer(*leaves, ids).sum().backward()

    return run


def measure(
    table: Table, op: str, what: dict[str, Any], ours: Peer, peers: dict[str, Peer], **cost: Any
) -> Callable[..., None]:
    """Rows for forward and forward + backward of one shape."""

    def rows(inputs: list[Tensor], ids: Tensor, truth: Tensor) -> None:
        broken = {name: fails(peer, *inputs, ids) for name, peer in peers.items()}
        alive = {name: peer for name, peer in peers.items() if broken[name] is None}
        error = errors({"deeprec": ours, **alive}, truth, *inputs, ids)
        assert error["deeprec"] <= 2 * max(error["torch"], 2**-20)
        worst = max(alive, key=lambda name: error[name])
        notes = {"error": f"{error['deeprec']:.1e}", "worst peer": f"{worst} {error[worst]:.1e}"}
        notes["does not run"] = ", ".join(f"{n} ({why})" for n, why in broken.items() if why)
        forward = {"deeprec": lambda: ours(*inputs, ids)}
        others = {name: (lambda p=peer: p(*inputs, ids)) for name, peer in alive.items()}
        result = table.row(
            op, {**what, "pass": "forward"}, ours=forward, peers=others, notes=notes, **cost
        )
        result["notes"]["fastest peer"] = result["fastest_peer"]
        leaves = [x.clone().requires_grad_() for x in inputs]
        result = table.row(
            op,
            {**what, "pass": "+ backward"},
            ours={"deeprec": backward(ours, leaves, ids)},
            peers={name: backward(peer, leaves, ids) for name, peer in alive.items()},
        )
        result["notes"]["fastest peer"] = result["fastest_peer"]

    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), GATHER)
def test_gather_logprobs(table: Table, rows: int, vocabulary: int, dtype: str) -> None:
    if table.short and (rows, vocabulary) != GATHER[0]:
        pytest.skip("takes too long for --short")
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocabulary) * 3).to(DTYPES[dtype])
    ids = torch.randint(0, vocabulary, (rows,))
    truth = logits[:CHECKED].double().log_softmax(-1).gather(-1, ids[:CHECKED, None])[:, 0]
    what = {"T": rows, "V": vocabulary, "dtype": dtype}
    run = measure(
        table,
        "gather_logprobs",
        what,
        gather_logprobs,
        gather_peers(not table.short),
        bytes_read=logits.nbytes,
    )
    run([logits], ids, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size", "vocabulary"), LINEAR)
def test_linear_logprobs(table: Table, rows: int, size: int, vocabulary: int, dtype: str) -> None:
    if table.short and (rows, size, vocabulary) != LINEAR[0]:
        pytest.skip("takes too long for --short")
    torch.manual_seed(0)
    hidden = torch.randn(rows, size).to(DTYPES[dtype])
    weight = (torch.randn(vocabulary, size) * 3 * size**-0.5).to(DTYPES[dtype])
    ids = torch.randint(0, vocabulary, (rows,))
    logits = hidden[:CHECKED].double() @ weight.double().T
    truth = logits.log_softmax(-1).gather(-1, ids[:CHECKED, None])[:, 0]
    what = {"T": rows, "H": size, "V": vocabulary, "dtype": dtype}
    unit = "fp32_fma" if dtype == "fp32" else "bf16_dot"
    run = measure(
        table,
        "linear_logprobs",
        what,
        linear_logprobs,
        linear_peers(not table.short),
        operations=2.0 * rows * size * vocabulary,
        unit=unit,
    )
    run([hidden, weight], ids, truth)


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

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    peer(hidden, weight, ids).sum().backward()
    returned = hidden.nbytes + weight.nbytes
    return (peak() - before - returned) / 2**20


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory(table: Table, dtype: str) -> None:
    shape = LINEAR[0] if table.short else LINEAR[3]
    megabytes = {}
    for name in ("deeprec", *linear_peers(not table.short)):
        arguments = json.dumps([name, *shape, dtype])
        answer = subprocess.run(
            [sys.executable, __file__, arguments], capture_output=True, text=True, check=False
        )
        done = answer.returncode == 0
        megabytes[f"{name} MB"] = f"{float(answer.stdout):.0f}" if done else "does not run"
    rows, size, vocabulary = shape
    what = {"T": rows, "H": size, "V": vocabulary, "dtype": dtype}
    table.results.append(
        {
            "op": "linear_logprobs extra memory",
            "what": what,
            "median_ms": {},
            "best_ms": {},
            "ours": [""],
            "notes": megabytes,
        }
    )
    if not table.short:
        assert float(megabytes["deeprec MB"]) <= 64


if __name__ == "__main__":
    print(megabytes_of(*json.loads(sys.argv[1])))
