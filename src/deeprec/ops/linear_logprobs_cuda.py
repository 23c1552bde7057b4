"""The CUDA C++ backend of linear_logprobs: rows sorted by kind, workspace, pointers.

Which rows count is decided on the device, so that nothing synchronises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops.linear_logprobs_op import empty_gradients, empty_outputs
from deeprec.ops.logprobs_cpu import address, dtype_name
from deeprec.ops.logprobs_cuda import current_stream

__all__ = ["kernels"]


def kernels(native: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What ``linear_logprobs_op.define`` wants, on the launchers of ``native``."""

    def forward(
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
        values, entropies, states = (x.zero_() for x in outputs)
        if not len(hidden):
            return values, entropies, states
        with backends.timed("linear_logprobs", "cuda"):
            allowed = (offsets, permitted)
            problem = _Problem(native, (hidden, weight), ids, bias, temperature, mask, allowed)
            workspace = _workspace(native.linear_forward_workspace(problem.native), hidden)
            native.linear_logprobs(
                problem.native,
                values=address(values),
                entropy=address(entropies) if entropy else 0,
                states=address(states),
                workspace=address(workspace),
                stream=problem.stream,
            )
        return values, entropies, states

    def backward(
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
        with backends.timed("linear_logprobs_backward", "cuda"):
            allowed = (offsets, permitted)
            problem = _Problem(native, (hidden, weight), ids, bias, temperature, mask, allowed)
            grad_values = grad_values.contiguous()
            grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
            tokens = _by_token(mask, offsets, permitted, len(weight)) if any(wanted[1:]) else ()
            at = [address(x) if x.numel() else 0 for x in gradients]
            io = native.LinearBackward(
                grad_values=address(grad_values),
                grad_entropy=address(grad_entropy),
                entropy=address(entropy),
                states=address(states),
                gradients=tuple(at),
                by_token=tuple(map(address, tokens)) or (0, 0, 0),
                permitted=0 if permitted is None else len(permitted),
            )
            workspace = _workspace(native.linear_backward_workspace(problem.native, io), hidden)
            native.linear_logprobs_backward(
                problem.native, io, workspace=address(workspace), stream=problem.stream
            )
        return gradients

    return forward, backward


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


class _Problem:
    """The C++ description of one call, with the tensors it points into kept alive."""

    def __init__(
        self,
        native: Any,
        matrices: tuple[Tensor, Tensor],
        ids: Tensor,
        bias: Tensor | None,
        temperature: float,
        mask: Tensor | None,
        allowed: tuple[Tensor | None, Tensor | None],
    ) -> None:
        self.matrices = [x if x.stride(-1) == 1 else x.contiguous() for x in matrices]
        self.arrays = [x if x is None else x.contiguous() for x in (ids, bias, *allowed)]
        self.order, self.counts = _order(matrices[0], mask, allowed[0])
        ids_at, bias_at, offsets_at, permitted_at = map(address, self.arrays)
        self.stream = current_stream(matrices[0])
        self.native = native.LinearProblem(
            hidden=_matrix(self.matrices[0]),
            weight=_matrix(self.matrices[1]),
            bias=bias_at,
            ids=ids_at,
            allowed=(offsets_at, permitted_at),
            order=(address(self.order), address(self.counts)),
            temperature=temperature,
        )


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
    mask: Tensor | None, offsets: Tensor | None, permitted: Tensor | None, vocabulary: int
) -> tuple[Tensor, ...]:
    """Starts ``[vocabulary + 1]``, rows and positions of the permitted ids of rows that count."""
    if offsets is None or permitted is None:
        return ()
    rows = torch.repeat_interleave(offsets.diff(), output_size=len(permitted))
    tokens = permitted
    if mask is not None:  # behind the last token, where nobody looks
        tokens = tokens.masked_fill(~mask[rows], vocabulary)
    tokens, positions = tokens.sort(stable=True)  # rows stay ascending within a token
    every = torch.arange(vocabulary + 1, device=tokens.device)
    return torch.searchsorted(tokens, every), rows[positions], positions
