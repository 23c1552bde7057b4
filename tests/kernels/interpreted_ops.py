"""Triton's ops as torch sees them, in the interpreter."""

from __future__ import annotations

import gpu_trm
import opchecks
import pytest
import torch
from layouts import check_layouts
from torch import Tensor

from deeprec import ItemIndex


# opcheck traces with symbols, whose warning about .grad of tensors that are no leaves is torch's.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "check",
    [opchecks.check_gather, opchecks.check_linear, opchecks.check_topk, gpu_trm.check_opcheck],
)
def test_triton_ops_pass_opcheck(check) -> None:
    check("triton")


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
