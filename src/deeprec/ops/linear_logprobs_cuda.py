"""linear_logprobs on CUDA: rows sorted by kind, workspace, and the kernels' addresses.

Which rows count is decided on the device, so that nothing synchronises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops import cuda
from deeprec.ops.linear_logprobs_op import define, empty_gradients, empty_outputs
from deeprec.ops.logprobs_cpu import address, dtype_name

__all__: list[str] = []


def _forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    offsets: Tensor | None,
    permitted: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = empty_outputs(
        hidden, weight, ids, bias, temperature, mask, offsets, permitted, entropy
    )
    values, entropies, states = (x.zero_() for x in outputs)  # rows that do not count stay so
    if not len(hidden):
        return values, entropies, states
    with backends.timed("linear_logprobs", "cuda"), cuda.on(hidden) as target:
        problem = _Problem((hidden, weight), ids, bias, temperature, mask, (offsets, permitted))
        workspace = _workspace(target.kernels.linear_forward_workspace(problem.native), hidden)
        target.kernels.linear_logprobs(
            problem.native,
            order=problem.order,
            values=address(values),
            entropy=address(entropies) if entropy else 0,
            states=address(states),
            workspace=(address(workspace), workspace.nbytes),
            stream=target.stream,
        )
    return values, entropies, states


def _backward(
    grad_values: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    offsets: Tensor | None,
    permitted: Tensor | None,
    entropy: Tensor,
    states: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = empty_gradients(hidden, weight, bias, wanted)
    if not len(hidden):
        gradients[1].zero_()
        return gradients
    with backends.timed("linear_logprobs_backward", "cuda"), cuda.on(hidden) as target:
        problem = _Problem((hidden, weight), ids, bias, temperature, mask, (offsets, permitted))
        grad_values = grad_values.contiguous()
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        tokens: tuple[Tensor | None, ...] = (None,) * 3
        if offsets is not None and permitted is not None and any(wanted[1:]):
            tokens = _by_token(mask, offsets, permitted, len(weight))
        io = target.kernels.LinearBackward(
            grad_values=address(grad_values),
            grad_entropy=address(grad_entropy),
            entropy=address(entropy),
            states=address(states),
            gradients=tuple(address(x) if x.numel() else 0 for x in gradients),
            by_token=tuple(map(address, tokens)),
            permitted=0 if permitted is None else len(permitted),
        )
        size = target.kernels.linear_backward_workspace(problem.native, io)
        workspace = _workspace(size, hidden)
        target.kernels.linear_logprobs_backward(
            problem.native,
            io,
            order=problem.order,
            workspace=(address(workspace), workspace.nbytes),
            stream=target.stream,
        )
    return gradients


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


class _Problem:
    """The C++ description of one call, with the tensors it points into kept alive."""

    def __init__(
        self,
        matrices: tuple[Tensor, Tensor],
        ids: Tensor,
        bias: Tensor | None,
        temperature: float,
        mask: Tensor | None,
        allowed: tuple[Tensor | None, Tensor | None],
    ) -> None:
        self.matrices = [x if x.stride(-1) == 1 else x.contiguous() for x in matrices]
        self.arrays = [x if x is None else x.contiguous() for x in (ids, bias, *allowed)]
        self.kinds = _order(matrices[0], mask, allowed[0])
        ids_at, bias_at, offsets_at, permitted_at = map(address, self.arrays)
        self.native = _C.LinearProblem(
            hidden=_matrix(self.matrices[0]),
            weight=_matrix(self.matrices[1]),
            bias=bias_at,
            ids=ids_at,
            mask=0,
            allowed=(offsets_at, permitted_at),
            temperature=temperature,
            threads=1,
        )
        self.order = (address(self.kinds[0]), address(self.kinds[1]))


def _matrix(tensor: Tensor) -> tuple[int, str, int, int, int]:
    return (address(tensor), dtype_name(tensor), *tensor.shape, tensor.stride(0))


def _order(hidden: Tensor, mask: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows with a full softmax, restricted ones, then the rest; and how many the first two are."""
    kind = torch.zeros(len(hidden), dtype=torch.uint8, device=hidden.device)
    if offsets is not None:
        kind += offsets.diff() > 0
    if mask is not None:
        kind.masked_fill_(~mask, 2)
    counts = torch.stack([(kind == 0).sum(), (kind == 1).sum()])
    return kind.argsort(stable=True), counts


def _by_token(
    mask: Tensor | None, offsets: Tensor, permitted: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Starts ``[vocabulary + 1]``, rows and positions of the permitted ids of rows that count."""
    rows = torch.repeat_interleave(offsets.diff(), output_size=len(permitted))
    tokens = permitted
    if mask is not None:  # behind the last token, where nobody looks
        tokens = tokens.masked_fill(~mask[rows], vocabulary)
    tokens, positions = tokens.sort(stable=True)  # rows stay ascending within a token
    every = torch.arange(vocabulary + 1, device=tokens.device)
    return torch.searchsorted(tokens, every), rows[positions], positions


def _why_not(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is float64, which only the reference computes"
    return cuda.why_not(hidden)


_run = define("linear_logprobs_cuda", "CompositeExplicitAutograd", _forward, _backward)
backends.register("linear_logprobs", "cuda", _run, _why_not)
