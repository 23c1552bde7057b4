"""The same numbers in other places: what strides and odd addresses must not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deeprec import gather_logprobs, linear_logprobs, topk_retrieve


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrix ``x`` transposed in memory, in every other column, and off the 16-byte grid."""
    yield "transposed", x.T.contiguous().T
    yield "every other column", x.repeat_interleave(2, 1)[:, ::2]
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert shifted.data_ptr() % 16
    yield "one element on", shifted
    yield "part of a wider matrix", torch.cat([x, x], 1)[:, : x.shape[1]]


def check_layouts(backend: str, dtype: torch.dtype) -> None:
    """Every op, each of its matrices in each layout, gradients included."""
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 12, generator=random), torch.randn(19, 12, generator=random)
    ids = torch.arange(5)

    def gather(logits: Tensor) -> Tensor:
        return gather_logprobs(logits, ids, backend=backend)  # type: ignore[return-value]

    def linear(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, ids, backend=backend)  # type: ignore[return-value]

    def top(queries: Tensor, items: Tensor) -> Tensor:
        return topk_retrieve(queries, items, 4, backend=backend).values

    same: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (gather, (b[:5].to(dtype),)),
        (linear, (a.to(dtype), b.to(dtype))),
        (top, (a, b.to(dtype))),
    ]
    for op, matrices in same:
        expected = outcome(op, matrices)
        for place, matrix in enumerate(matrices):
            for name, view in layouts(matrix):
                moved = (*matrices[:place], view, *matrices[place + 1 :])
                for got, wanted in zip(outcome(op, moved), expected, strict=True):
                    assert torch.equal(got, wanted), (op.__name__, place, name)


def outcome(op: Callable[..., Tensor], matrices: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [matrix.detach().requires_grad_(op.__name__ != "top") for matrix in matrices]
    values = op(*leaves)
    if not values.requires_grad:
        return [values]
    return [values.detach(), *torch.autograd.grad(values.sum(), leaves)]
