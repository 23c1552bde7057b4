"""Triton's ops as torch sees them, in the interpreter.

Top-k is one op for all backends, and its opcheck is a test of the op's own; here it is compiled.
"""

from __future__ import annotations

import pytest
import torch
from layouts import check_layouts
from torch import Tensor

from deeprec import ItemIndex
from deeprec.ops import linear_logprobs_triton, logprobs_triton  # noqa: F401, they define the ops

# Two of four rows are limited to some tokens, one does not count, and its id is never read.
IDS = torch.tensor([1, 4, -100, 2])
MASK = torch.tensor([True, True, False, True])
ROWS = (MASK, torch.tensor([0, 0, 3, 3, 5]), torch.tensor([1, 4, 6, 0, 2]), True)


def leaf(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).requires_grad_()


# opcheck traces with symbols, whose warning about .grad of tensors that are no leaves is torch's.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_triton_gather_logprobs_passes_opcheck() -> None:
    op = torch.ops.deeprec.gather_logprobs_triton.default
    torch.library.opcheck(op, (leaf(4, 7), IDS[:, None], 0.8, *ROWS))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_triton_linear_logprobs_passes_opcheck() -> None:
    op = torch.ops.deeprec.linear_logprobs_triton.default
    torch.library.opcheck(op, (leaf(4, 5), leaf(7, 5), IDS, leaf(7), 0.8, *ROWS))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_triton_topk_compiles_into_one_graph(backend: str) -> None:
    index = ItemIndex(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = index.search(queries, 3, backend="triton")
        return values, indices + 1

    queries = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(search, fullgraph=True, backend=backend)
    for got, expected in zip(compiled(queries), search(queries), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_strides_and_odd_addresses_change_nothing(dtype: torch.dtype) -> None:
    check_layouts("triton", dtype)
