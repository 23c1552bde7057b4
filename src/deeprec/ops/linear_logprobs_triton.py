"""The Triton backend of linear_logprobs: chunks, workspaces and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops.gpu import float32_products, why_not_triton
from deeprec.ops.linear_logprobs_op import Gradients, LinearCall, define, why_not_float64
from deeprec.ops.logprob_checks import check_range, reads_values
from deeprec.ops.logprobs_op import Upstream

__all__ = ["run", "why_not"]

# Gradients of logits that exist at a time: CHUNK columns of the vocabulary for CHUNK_ROWS rows,
# 32 MB in float32. A hidden gradient is a sum over chunks of columns, so their width is fixed.
CHUNK = 2048
CHUNK_ROWS = 4096
# Width of a product's operands in a step: 128 bytes of 16-bit numbers, one memory transaction; half
# of that in float32, which is multiplied as three tf32 products whose operands fill registers.
WIDTH = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}
# Entries of limited rows, and dimensions, that a program handles at once.
ENTRIES, DIMENSIONS, PERMITTED = 32, 64, 1024
MAX_SIZE = 2**31 - 2**16  # vocabulary and width are counted in 32 bits


def why_not(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None where the kernels can run, else the reason."""
    if max(weight.shape) > MAX_SIZE:
        return f"weight has a side of {max(weight.shape)}, longer than {MAX_SIZE}"
    return why_not_float64(hidden, weight, bias) or why_not_triton(hidden)


class _Problem(LinearCall):
    """One call's arguments as the kernels take them."""

    @property
    def inverse(self) -> float:
        return 1 / self.temperature

    def entry_rows(self) -> Tensor:
        """The row of every permitted id."""
        assert self.offsets is not None and self.permitted is not None
        rows = torch.arange(self.rows, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=len(self.permitted))

    def entry_logits(self, entry_rows: Tensor) -> Tensor:
        """float32 ``[nnz]``: the logits of the permitted ids, and no others."""
        from deeprec.kernels import LAUNCH
        from deeprec.kernels import linear_logprobs_limited as kernels

        logits = torch.empty(len(entry_rows), dtype=torch.float32, device=entry_rows.device)
        kernels.sparse_logits[(-(-len(entry_rows) // ENTRIES),)](
            self.hidden,
            self.weight,
            self.bias,
            self.mask,
            entry_rows,
            self.permitted,
            logits,
            len(entry_rows),
            self.rows,
            self.vocabulary,
            self.size,
            self.hidden.stride(0),
            self.weight.stride(0),
            BLOCK_E=ENTRIES,
            BLOCK_H=DIMENSIONS,
            **LAUNCH,
        )
        return logits

    def limited(self) -> bool:
        """Whether any row may be limited."""
        return self.permitted is not None and len(self.permitted) > 0

    def dot(self, dtype: torch.dtype) -> dict[str, Any]:
        """How products of this dtype are computed, for the kernels' constants."""
        import triton.language as tl

        return {
            "DOT": getattr(tl, str(dtype).removeprefix("torch.")),
            "PRECISION": float32_products() if dtype == torch.float32 else "ieee",
        }

    def common_dtype(self, *, backward: bool) -> torch.dtype:
        """float32 unless both operands are the same 16-bit type.

        Gradients of logits underflow in float16, so the backward pass computes those in float32.
        """
        same = self.hidden.dtype == self.weight.dtype
        if not same or (backward and self.hidden.dtype == torch.float16):
            return torch.float32
        return self.hidden.dtype


def _forward(call: LinearCall, values: Tensor, entropy: Tensor | None, states: Tensor) -> None:
    with torch.cuda.device_of(call.hidden):
        if reads_values(call.hidden):
            check_range(call.ids, call.mask, call.permitted, call.vocabulary)
        _launch_forward(_Problem(**vars(call)), values, entropy, states)


def _launch_forward(p: _Problem, values: Tensor, entropy: Tensor | None, states: Tensor) -> None:
    import triton

    from deeprec.kernels import LAUNCH
    from deeprec.kernels import linear_logprobs as kernels
    from deeprec.kernels import linear_logprobs_limited as limited

    dtype = p.common_dtype(backward=False)
    splits = triton.cdiv(p.vocabulary, kernels.SPLIT)
    partial = values.new_empty((splits, p.rows, 4))
    kernels.linear_forward[lambda meta: (triton.cdiv(p.rows, meta["BLOCK_T"]), splits)](
        p.hidden,
        p.weight,
        p.bias,
        p.ids,
        p.mask,
        p.offsets,
        partial,
        p.rows,
        p.vocabulary,
        p.size,
        p.hidden.stride(0),
        p.weight.stride(0),
        p.inverse,
        SPLIT=kernels.SPLIT,
        BLOCK_H=WIDTH[dtype],
        **p.dot(dtype),
        **LAUNCH,
    )
    kernels.linear_merge[(p.rows,)](
        p.ids,
        p.mask,
        p.offsets,
        partial,
        values,
        entropy,
        states,
        p.rows,
        p.vocabulary,
        splits,
        p.inverse,
        SPLITS=triton.next_power_of_2(splits),
        **LAUNCH,
    )
    if p.limited():
        limited.sparse_softmax[(p.rows,)](
            p.entry_logits(p.entry_rows()),
            p.ids,
            p.mask,
            p.offsets,
            p.permitted,
            values,
            entropy,
            states,
            p.rows,
            p.vocabulary,
            p.inverse,
            BLOCK=PERMITTED,
            **LAUNCH,
        )


def _backward(call: LinearCall, upstream: Upstream, gradients: Gradients) -> None:
    with torch.cuda.device_of(call.hidden):
        _Backward(_Problem(**vars(call)), upstream).run(gradients)


class _Backward:
    """The launches of one backward pass."""

    def __init__(self, problem: _Problem, upstream: Upstream) -> None:
        self.p = problem
        self.grad_values = upstream.grad_values
        self.grad_entropy = upstream.grad_entropy
        self.entropy = upstream.entropy
        self.states = upstream.states
        self.dtype = problem.common_dtype(backward=True)
        self.chunk = min(CHUNK, problem.vocabulary)
        self.rows = min(CHUNK_ROWS, problem.rows)
        self.entries: tuple[Tensor, ...] | None = None
        if problem.limited():
            self.entries = self._entries()

    def run(self, gradients: Gradients) -> None:
        p = self.p
        grad_hidden = gradients.hidden
        if grad_hidden is not None and grad_hidden.dtype != torch.float32:
            grad_hidden = torch.empty(p.hidden.shape, dtype=torch.float32, device=p.hidden.device)
        grad_weight = gradients.weight
        if grad_weight is None and gradients.bias is not None:
            # A bias alone is rare: its kernel computes the weight's gradient as well.
            grad_weight = torch.empty_like(p.weight)
        work = torch.empty(
            (self.rows, self.chunk),
            dtype=torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32,
            device=p.hidden.device,
        )
        # Sums over several blocks of rows are kept in float32 until the last.
        sums = None
        if grad_weight is not None and self.rows < p.rows:
            shape = (self.chunk, p.size + 1)
            sums = torch.empty(shape, dtype=torch.float32, device=work.device)
        for column in range(0, p.vocabulary, self.chunk):
            for row in range(0, p.rows, self.rows):
                self._grad_logits(work, row, column)
                if grad_hidden is not None:
                    self._grad_hidden(work, grad_hidden, row, column)
                if grad_weight is not None:
                    self._grad_weight(work, sums, grad_weight, gradients.bias, row, column)
        if grad_hidden is not None and gradients.hidden is not None:
            if self.entries is not None:
                self._sparse_grad_hidden(grad_hidden)
            if grad_hidden is not gradients.hidden:
                gradients.hidden.copy_(grad_hidden)

    def _entries(self) -> tuple[Tensor, ...]:
        """Order by token, first of every token, row and gradient of the permitted ids."""
        from deeprec.kernels import LAUNCH
        from deeprec.kernels import linear_logprobs_limited as kernels

        p = self.p
        assert p.permitted is not None
        rows = p.entry_rows()
        logits = p.entry_logits(rows)
        gradient = torch.empty_like(logits)
        kernels.sparse_grad_logits[(-(-len(rows) // PERMITTED),)](
            self.grad_values,
            self.grad_entropy,
            logits,
            p.ids,
            p.mask,
            rows,
            p.permitted,
            self.entropy,
            self.states,
            gradient,
            len(rows),
            p.rows,
            p.inverse,
            BLOCK=PERMITTED,
            **LAUNCH,
        )
        tokens, order = p.permitted.sort(stable=True)
        every = torch.arange(p.vocabulary + 1, device=tokens.device)
        return order, torch.searchsorted(tokens, every), rows, gradient

    def _grad_logits(self, work: Tensor, row: int, column: int) -> None:
        import triton

        from deeprec.kernels import LAUNCH
        from deeprec.kernels import linear_logprobs_backward as kernels

        p = self.p
        kernels.linear_grad_logits[
            lambda meta: (
                triton.cdiv(self.rows, meta["BLOCK_T"]),
                triton.cdiv(self.chunk, meta["BLOCK_V"]),
            )
        ](
            self.grad_values,
            self.grad_entropy,
            p.hidden,
            p.weight,
            p.bias,
            p.ids,
            p.mask,
            p.offsets,
            self.entropy,
            self.states,
            work,
            row,
            column,
            min(row + self.rows, p.rows),
            self.chunk,
            p.vocabulary,
            p.size,
            p.hidden.stride(0),
            p.weight.stride(0),
            p.inverse,
            BLOCK_H=WIDTH[self.dtype],
            **p.dot(self.dtype),
            **LAUNCH,
        )

    def _grad_hidden(self, work: Tensor, grad_hidden: Tensor, row: int, column: int) -> None:
        import triton

        from deeprec.kernels import LAUNCH
        from deeprec.kernels import linear_logprobs_backward as kernels

        p = self.p
        kernels.linear_grad_hidden[
            lambda meta: (
                triton.cdiv(self.rows, meta["BLOCK_M"]),
                triton.cdiv(p.size, meta["BLOCK_N"]),
            )
        ](
            work,
            p.weight,
            p.mask,
            p.offsets,
            grad_hidden,
            row,
            column,
            min(self.rows, p.rows - row),
            p.rows,
            self.chunk,
            p.vocabulary,
            p.size,
            p.weight.stride(0),
            BLOCK_K=WIDTH[self.dtype],
            **p.dot(self.dtype),
            **LAUNCH,
        )

    def _grad_weight(
        self,
        work: Tensor,
        sums: Tensor | None,
        grad_weight: Tensor,
        grad_bias: Tensor | None,
        row: int,
        column: int,
    ) -> None:
        import triton

        from deeprec.kernels import LAUNCH
        from deeprec.kernels import linear_logprobs_backward as kernels

        p = self.p
        order, start, rows, gradient = self.entries or (None,) * 4
        kernels.linear_grad_weight[
            lambda meta: (
                triton.cdiv(self.chunk, meta["BLOCK_M"]),
                triton.cdiv(p.size, meta["BLOCK_N"]),
            )
        ](
            work,
            p.hidden,
            p.mask,
            p.offsets,
            order,
            start,
            rows,
            p.permitted,
            gradient,
            sums,
            grad_weight,
            grad_bias,
            row,
            column,
            min(self.rows, p.rows - row),
            p.rows,
            self.chunk,
            p.vocabulary,
            p.size,
            p.hidden.stride(0),
            LAST=row + self.rows >= p.rows,
            BLOCK_K=WIDTH[self.dtype],
            **p.dot(self.dtype),
            **LAUNCH,
        )

    def _sparse_grad_hidden(self, grad_hidden: Tensor) -> None:
        import triton

        from deeprec.kernels import LAUNCH
        from deeprec.kernels import linear_logprobs_limited as kernels

        p = self.p
        assert self.entries is not None
        kernels.sparse_grad_hidden[(p.rows, triton.cdiv(p.size, DIMENSIONS))](
            p.weight,
            p.mask,
            p.offsets,
            p.permitted,
            self.entries[3],
            grad_hidden,
            p.rows,
            p.vocabulary,
            p.size,
            p.weight.stride(0),
            BLOCK_E=ENTRIES,
            BLOCK_H=DIMENSIONS,
            **LAUNCH,
        )


run = define("triton", "CompositeExplicitAutograd", _forward, _backward)
backends.register("linear_logprobs", "triton", run, why_not)
