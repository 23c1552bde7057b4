"""The compiled extension. Tensors cross as addresses (``Tensor.data_ptr()``, 0 for none)."""

from types import ModuleType
from typing import overload

cuda: ModuleType  # the CUDA kernels (csrc/cuda/bindings.cpp), in a build that has them

def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...

class GatherProblem:
    def __init__(
        self,
        *,
        logits: int,
        dtype: str,
        row_offsets: int,
        shape: tuple[int, int, int],
        ids: int,
        mask: int,
        allowed: tuple[int, int],
        temperature: float,
        threads: int,
    ) -> None: ...

def gather_logprobs(problem: GatherProblem, *, values: int, entropy: int, states: int) -> None: ...
def gather_logprobs_backward(
    problem: GatherProblem,
    *,
    grad_values: int,
    grad_entropy: int,
    entropy: int,
    states: int,
    grad_logits: int,
) -> None: ...

_Matrix = tuple[int, str, int, int, int]  # address, dtype, rows, columns, row stride

class LinearProblem:
    def __init__(
        self,
        *,
        hidden: _Matrix,
        weight: _Matrix,
        bias: int,
        ids: int,
        mask: int,
        allowed: tuple[int, int],
        temperature: float,
        threads: int,
    ) -> None: ...

def linear_logprobs(problem: LinearProblem, *, values: int, entropy: int, states: int) -> None: ...
def linear_logprobs_backward(
    problem: LinearProblem,
    *,
    grad_values: int,
    grad_entropy: int,
    entropy: int,
    states: int,
    grad_hidden: int,
    grad_weight: int,
    grad_bias: int,
) -> None: ...

class ItemRows:
    def __init__(self, data: int, count: int, dim: int, stride: int, dtype: str) -> None: ...

class Prefilter:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(
        self,
        codes: int,
        bounds: int,
        order: int,
        center: int,
        centers: int,
        cluster: int,
        fine: int,
        fine_bounds: int,
    ) -> None: ...

def advise_huge_pages(data: int, bytes: int) -> None: ...
def topk_code_shape(count: int, dim: int) -> tuple[int, int, int]: ...
def topk_row_norms(rows: ItemRows, center: int, norms: int, threads: int) -> None: ...
def topk_normalize_rows(rows: ItemRows, out: int, threads: int) -> None: ...
def topk_encode_blocks(
    rows: ItemRows, filter: Prefilter, blocks: int, n_blocks: int, threads: int
) -> None: ...
def topk_search(
    rows: ItemRows,
    filter: Prefilter,
    queries: int,
    count: int,
    k: int,
    exclude: tuple[int, int],
    answer: tuple[int, int, int, int],
    threads: int,
) -> None: ...

# Operations (bytes) a second.
def peak_fp32_fma(seconds: float, threads: int) -> float: ...
def peak_fp64_fma(seconds: float, threads: int) -> float: ...
def peak_int8_dot(seconds: float, threads: int) -> float: ...
def peak_bf16_dot(seconds: float, threads: int) -> float: ...
def peak_exp_sum(seconds: float, threads: int) -> float: ...
def peak_read_bandwidth(seconds: float, threads: int) -> float: ...

class TRMModel:
    def __init__(self, sizes: dict[str, int], eps: float, tensors: dict[str, int]) -> None: ...

class TRMRequest:
    def __init__(
        self,
        count: int,
        history: tuple[int, int, int],
        states: int,
        preference: int,
        threads: int,
    ) -> None: ...

def trm_encode(model: TRMModel, request: TRMRequest, *, states: int, users: int) -> None: ...
def trm_retrieve(
    model: TRMModel,
    request: TRMRequest,
    rows: ItemRows,
    filter: Prefilter,
    k: int,
    exclude: tuple[int, int],
    exclude_history: bool,
    answer: tuple[int, int],
) -> None: ...
