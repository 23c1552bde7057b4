"""``torch.library.opcheck`` of the ops of a backend: schema, fake tensors, autograd, tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deeprec import ItemIndex, SeenItems

# Two of four rows are limited to some tokens, one does not count, and its id is never read.
IDS = torch.tensor([1, 4, -100, 2])
ROWS = (
    torch.tensor([True, True, False, True]),
    torch.tensor([0, 0, 3, 3, 5]),
    torch.tensor([1, 4, 6, 0, 2]),
)
TEMPERATURE = 0.8


def leaf(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).requires_grad_()


def op(name: str, backend: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(
        torch.ops.deeprec, name.format("" if backend == "cpu" else f"_{backend}")
    ).default
    return found


def check_gather(backend: str) -> None:
    """Forward and backward, with entropy and without."""
    logits = leaf(4, 7)
    problem = (logits, IDS[:, None], TEMPERATURE, *ROWS)
    for entropy in (True, False):
        forward = op("gather_logprobs{}", backend)
        torch.library.opcheck(forward, (*problem, entropy))
        values, entropies, states = (x.detach() for x in forward(*problem, entropy))
        upstream = (torch.ones_like(values), torch.ones_like(entropies) if entropy else None)
        rest = (logits.detach(), *problem[1:], entropies, states)
        torch.library.opcheck(op("gather_logprobs{}_backward", backend), (*upstream, *rest))


def check_linear(backend: str) -> None:
    """Forward and backward, with bias and entropy and without, of all gradients and of one."""
    hidden, weight, bias = leaf(4, 5), leaf(7, 5), leaf(7)
    for given, entropy, wanted in ((bias, True, [True] * 3), (None, False, [False, True, False])):
        problem = (hidden, weight, IDS, given, TEMPERATURE, *ROWS)
        forward = op("linear_logprobs{}", backend)
        torch.library.opcheck(forward, (*problem, entropy))
        values, entropies, states = (x.detach() for x in forward(*problem, entropy))
        upstream = (torch.ones_like(values), torch.ones_like(entropies) if entropy else None)
        inputs = (x.detach() if isinstance(x, Tensor) else x for x in problem)
        arguments = (*upstream, *inputs, entropies, states, wanted)
        torch.library.opcheck(op("linear_logprobs{}_backward", backend), arguments)


def check_topk(backend: str) -> None:
    """With an index's prefilter and exclusions, and without either."""
    generator = torch.Generator().manual_seed(0)
    items, queries = (torch.randn(n, 8, generator=generator) for n in (600, 3))
    seen = SeenItems.from_lists([[1], [], [2, 3]])
    for given in ((ItemIndex(items)._table, seen.offsets, seen.ids), (None, None, None)):
        torch.library.opcheck(torch.ops.deeprec.topk.default, (queries, items, *given, 4, backend))
