"""Gradients of ``linear_logprobs``: logits again, their gradients, two products that read those.

Logits are recomputed for a chunk of the vocabulary, their gradient goes to a workspace of fixed
size, and two matrix products read it. Sums run over chunks of fixed width in a fixed order and
nothing is added atomically: a row's gradient is the same in any batch. The idea of recomputing:
Wijmans et al., Cut your losses (2024).
"""

import triton
import triton.language as tl

from deeprec.kernels.linear_logprobs import KEY, LARGE, SMALL, dense_rows, logits_tile, of_rows
from deeprec.kernels.softmax import gradient_of_logit

GRADIENT_TILES = [triton.Config(SMALL, num_warps=4, num_stages=3), LARGE]
# Products: [BLOCK_M, BLOCK_N] outputs. Tuning runs a kernel many times, on the first chunk and the
# first rows, where it overwrites its output: it may.
PRODUCTS = [
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=8, num_stages=3),
]


@triton.autotune(configs=GRADIENT_TILES, key=KEY)
@triton.jit
def linear_grad_logits(
    grad_values,
    grad_entropy,
    hidden,
    weight,
    bias,
    ids,
    mask,
    offsets,
    entropy,
    states,
    grad_logits,
    first_row,
    first_column,
    count,
    chunk,
    vocabulary,
    size,
    hidden_stride,
    weight_stride,
    inverse,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the logits of rows from ``first_row`` and ``chunk`` columns; dense rows only."""
    local = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = first_row + local
    dense = dense_rows(mask, offsets, rows, count)
    if tl.max(dense.to(tl.int32), 0) > 0:
        at = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        columns = first_column + at
        x = logits_tile(
            hidden + rows * hidden_stride,
            dense,
            weight,
            bias,
            columns,
            vocabulary,
            size,
            weight_stride,
            BLOCK_H,
            DOT,
            PRECISION,
        )
        token = tl.load(ids + rows, mask=dense, other=-1)
        incoming, of_entropy, spread, top, total = of_rows(
            grad_values, grad_entropy, entropy, states, rows, dense
        )
        gradient = gradient_of_logit(
            x,
            top[:, None],
            total[:, None],
            spread[:, None],
            incoming[:, None],
            of_entropy[:, None],
            inverse,
        )
        own = token[:, None] == columns[None, :]
        gradient += tl.where(own, incoming[:, None] * inverse, 0.0)
        tl.store(
            grad_logits + local[:, None] * chunk + at[None, :],
            gradient.to(grad_logits.dtype.element_ty),
            mask=dense[:, None] & (at < chunk)[None, :],
        )


@triton.autotune(configs=PRODUCTS, key=KEY)
@triton.jit
def linear_grad_hidden(
    grad_logits,
    weight,
    mask,
    offsets,
    grad_hidden,
    first_row,
    first_column,
    rows_here,
    count,
    chunk,
    vocabulary,
    size,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``grad_hidden += grad_logits @ weight[chunk]`` in float32; the first chunk overwrites."""
    local = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first_row + local
    here = local < rows_here
    dense = here & dense_rows(mask, offsets, rows, count)
    at = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = grad_hidden + rows[:, None] * size + at[None, :]
    valid = here[:, None] & (at < size)[None, :]
    acc = tl.load(out, mask=valid & (first_column > 0), other=0.0)
    end = tl.where(tl.max(dense.to(tl.int32), 0) > 0, chunk, 0)
    for first in range(0, end, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        present = (inner < chunk) & (first_column + inner < vocabulary)
        a = tl.load(
            grad_logits + local[:, None] * chunk + inner[None, :],
            mask=dense[:, None] & present[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + (first_column + inner)[:, None].to(tl.int64) * weight_stride + at[None, :],
            mask=present[:, None] & (at < size)[None, :],
            other=0.0,
        )
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    tl.store(out, acc, mask=valid)


@triton.autotune(configs=PRODUCTS, key=KEY)
@triton.jit
def linear_grad_weight(
    grad_logits,
    hidden,
    mask,
    offsets,
    entry_order,
    entry_start,
    entry_row,
    entry_token,
    entry_grad,
    sums,
    grad_weight,
    grad_bias,
    first_row,
    first_column,
    rows_here,
    count,
    chunk,
    vocabulary,
    size,
    hidden_stride,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``grad_weight[chunk] += grad_logits.T @ hidden``, sums kept in float32 until the last rows.

    The entries of limited rows, in the order of their tokens, join in with the last rows.
    ``sums`` is ``[chunk, size + 1]``, the bias's in the last column; None where the rows are done
    at once.
    """
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    vocab = first_column + column
    inside = (column < chunk) & (vocab < vocabulary)
    at = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = inside[:, None] & (at < size)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    of_bias = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, rows_here, BLOCK_K):
        local = first + tl.arange(0, BLOCK_K).to(tl.int64)
        rows = first_row + local
        dense = (local < rows_here) & dense_rows(mask, offsets, rows, count)
        a = tl.load(
            grad_logits + local[None, :] * chunk + column[:, None],
            mask=dense[None, :] & inside[:, None],
            other=0.0,
        )
        b = tl.load(
            hidden + rows[:, None] * hidden_stride + at[None, :],
            mask=dense[:, None] & (at < size)[None, :],
            other=0.0,
        )
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
        of_bias += tl.sum(a.to(tl.float32), 1)
    if sums is not None:
        kept = sums + column[:, None].to(tl.int64) * (size + 1) + at[None, :]
        kept_bias = sums + column.to(tl.int64) * (size + 1) + size
        if first_row > 0:
            acc += tl.load(kept, mask=valid, other=0.0)
            of_bias += tl.load(kept_bias, mask=inside & (tl.program_id(1) == 0), other=0.0)
    if LAST:
        if entry_order is not None:
            begin = tl.load(
                entry_start + tl.minimum(first_column + tl.program_id(0) * BLOCK_M, vocabulary)
            )
            stop = first_column + (tl.program_id(0) + 1) * BLOCK_M
            end = tl.load(entry_start + tl.minimum(stop, vocabulary))
            for first in range(begin, end, BLOCK_K):
                position = first + tl.arange(0, BLOCK_K)
                present = position < end
                entry = tl.load(entry_order + position, mask=present, other=0)
                row = tl.load(entry_row + entry, mask=present, other=0)
                token = tl.load(entry_token + entry, mask=present, other=-1)
                gradient = tl.load(entry_grad + entry, mask=present, other=0.0)
                a = tl.where(token[None, :] == vocab[:, None], gradient[None, :], 0.0)
                # Rows that do not count may hold anything: their entries are not read.
                present = present & dense_rows(mask, None, row, count)
                b = tl.load(
                    hidden + row[:, None] * hidden_stride + at[None, :],
                    mask=present[:, None] & (at < size)[None, :],
                    other=0.0,
                )
                acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
                of_bias += tl.sum(a, 1)
        out = grad_weight + vocab[:, None].to(tl.int64) * size + at[None, :]
        tl.store(out, acc.to(grad_weight.dtype.element_ty), mask=valid)
        if grad_bias is not None:
            tl.store(grad_bias + vocab, of_bias, mask=inside & (tl.program_id(1) == 0))
    elif sums is not None:
        tl.store(kept, acc, mask=valid)
        tl.store(kept_bias, of_bias, mask=inside & (tl.program_id(1) == 0))
