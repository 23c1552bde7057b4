"""The compiled extension. Tensors cross as addresses (``Tensor.data_ptr()``, 0 for none)."""

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
