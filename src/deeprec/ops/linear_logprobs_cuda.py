"""linear_logprobs on CUDA: rows sorted by kind, workspace, and the kernels' addresses.

Which rows count is decided on the device, so that nothing synchronises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deeprec import _C, backends
from deeprec.ops import cuda
from deeprec.ops.linear_logprobs_op import Gradients, LinearCall, define, why_not_float64
from deeprec.ops.logprobs_op import Upstream
from deeprec.ops.native import address, matrix

__all__: list[str] = []


def _forward(call: LinearCall, values: Tensor, entropy: Tensor | None, states: Tensor) -> None:
    for output in (values, entropy, states):
        if output is not None:
            output.zero_()  # rows that do not count stay so
    with cuda.on(call.hidden) as target:
        problem = _Problem(call)
        workspace = _workspace(target.kernels.linear_forward_workspace(problem.native), call)
        target.kernels.linear_logprobs(
            problem.native,
            order=problem.order,
            values=address(values),
            entropy=address(entropy),
            states=address(states),
            workspace=(address(workspace), workspace.nbytes),
            stream=target.stream,
        )


def _backward(call: LinearCall, upstream: Upstream, gradients: Gradients) -> None:
    with cuda.on(call.hidden) as target:
        problem = _Problem(call)
        tokens: tuple[Tensor | None, ...] = (None,) * 3
        head = gradients.weight is not None or gradients.bias is not None
        if head and call.offsets is not None and call.permitted is not None:
            tokens = _by_token(call.mask, call.offsets, call.permitted, call.vocabulary)
        io = target.kernels.LinearBackward(
            **upstream.addresses(),
            gradients=tuple(map(address, vars(gradients).values())),
            by_token=tuple(map(address, tokens)),
            permitted=0 if call.permitted is None else len(call.permitted),
        )
        size = target.kernels.linear_backward_workspace(problem.native, io)
        workspace = _workspace(size, call)
        target.kernels.linear_logprobs_backward(
            problem.native,
            io,
            order=problem.order,
            workspace=(address(workspace), workspace.nbytes),
            stream=target.stream,
        )


def _workspace(size: int, call: LinearCall) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=call.hidden.device)


class _Problem:
    """The C++ description of one call and the order of its rows; it points into ``call``."""

    def __init__(self, call: LinearCall) -> None:
        self.kinds = _order(call.hidden, call.mask, call.offsets)
        self.order = (address(self.kinds[0]), address(self.kinds[1]))
        self.native = _C.LinearProblem(
            hidden=matrix(call.hidden),
            weight=matrix(call.weight),
            bias=address(call.bias),
            ids=address(call.ids),
            mask=0,
            allowed=(address(call.offsets), address(call.permitted)),
            temperature=call.temperature,
            threads=1,
        )


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
    return why_not_float64(hidden, weight, bias) or cuda.why_not(hidden)


_run = define("cuda", "CompositeExplicitAutograd", _forward, _backward)
backends.register("linear_logprobs", "cuda", _run, _why_not)
