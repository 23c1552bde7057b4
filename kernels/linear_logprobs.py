"""Log-probs of tokens under ``hidden @ weight.T + bias``; the logits exist a tile at a time.

Forward, a program takes a block of rows and SPLIT columns of the vocabulary, keeps the softmax
online, and a second kernel merges the splits. Backward, logits are recomputed for a chunk of the
vocabulary, their gradient goes to a workspace of fixed size, and two matrix products read it.
Every sum runs over splits and chunks of fixed width in a fixed order, so that a row's value and
gradient are the same in any batch; nothing is added atomically.

Rows limited to some ids are "sparse": one entry a permitted id, each a dot product with one row of
the weight, in kernels of their own. Offsets are 64-bit. The ideas: Dao et al., FlashAttention
(2022), for the online softmax over tiles; Wijmans et al., Cut your losses (2024), for recomputing
logits in the backward pass.
"""

import triton
import triton.language as tl

from deeprec.kernels.softmax import (
    LOWEST,
    add_logits,
    contains,
    find,
    gradient_of_logit,
    merge_lanes,
)

# Columns a program of the forward pass goes through. A multiple of every BLOCK_V; small enough
# that a few hundred rows of a 50,000-word vocabulary fill a large GPU.
SPLIT = 4096
# Two tiles: the larger reuses operands best, the smaller fills the GPU when rows are few. Warps are
# as many as keep float32 products (three in tf32) from spilling, on every target.
LARGE = triton.Config({"BLOCK_T": 64, "BLOCK_V": 128}, num_warps=8, num_stages=3)
SMALL = {"BLOCK_T": 64, "BLOCK_V": 64}
FORWARD_TILES = [triton.Config(SMALL, num_warps=8, num_stages=3), LARGE]
GRADIENT_TILES = [triton.Config(SMALL, num_warps=4, num_stages=3), LARGE]
# Products of the backward pass: [BLOCK_M, BLOCK_N] outputs. Tuning runs a kernel many times, on the
# first chunk and the first rows, where it overwrites its output: it may.
PRODUCTS = [
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=8, num_stages=3),
]
KEY = ["vocabulary", "size"]


@triton.jit
def dense_rows(mask, offsets, rows, count):
    """Which rows count and may be any token."""
    dense = rows < count
    if mask is not None:
        dense = dense & (tl.load(mask + rows, mask=dense, other=0) != 0)
    if offsets is not None:
        begin = tl.load(offsets + rows, mask=dense, other=0)
        dense = dense & (tl.load(offsets + rows + 1, mask=dense, other=0) == begin)
    return dense


@triton.jit
def logits_tile(
    hidden,
    weight,
    bias,
    rows,
    dense,
    columns,
    vocabulary,
    size,
    hidden_stride,
    weight_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[BLOCK_T, BLOCK_V]`` of logits in float32; −inf beyond the vocabulary."""
    inside = columns < vocabulary
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for first in range(0, size, BLOCK_H):
        at = first + tl.arange(0, BLOCK_H)
        present = at < size
        a = tl.load(
            hidden + rows[:, None] * hidden_stride + at[None, :],
            mask=dense[:, None] & present[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + columns[None, :].to(tl.int64) * weight_stride + at[:, None],
            mask=inside[None, :] & present[:, None],
            other=0.0,
        )
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    return tl.where(inside[None, :], acc, float("-inf"))


@triton.autotune(configs=FORWARD_TILES, key=KEY)
@triton.jit
def linear_forward(
    hidden,
    weight,
    bias,
    ids,
    mask,
    offsets,
    partial,
    count,
    vocabulary,
    size,
    hidden_stride,
    weight_stride,
    inverse,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes maximum, Σ e, Σ e·d and the token's logit to ``partial[split, row]``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    dense = dense_rows(mask, offsets, rows, count)
    token = tl.load(ids + rows, mask=dense, other=-1)
    largest = tl.full((BLOCK_T,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    chosen = tl.zeros((BLOCK_T,), tl.float32)

    begin = tl.program_id(1) * SPLIT
    # A block without a dense row reads nothing of the weight.
    end = tl.where(tl.max(dense.to(tl.int32), 0) > 0, tl.minimum(begin + SPLIT, vocabulary), begin)
    for first in range(begin, end, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        x = logits_tile(
            hidden,
            weight,
            bias,
            rows,
            dense,
            columns,
            vocabulary,
            size,
            hidden_stride,
            weight_stride,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
            DOT,
            PRECISION,
        )
        chosen += tl.sum(tl.where(token[:, None] == columns[None, :], x, 0.0), 1)
        top = tl.maximum(largest, tl.max(x, 1))
        d = (x - top[:, None]) * inverse
        e = tl.exp(d)
        shift = (largest - top) * inverse
        f = tl.exp(shift)
        weighted = f * weighted + tl.where(f == 0.0, 0.0, f * shift) * total
        weighted += tl.sum(tl.where(e == 0.0, 0.0, e * d), 1)
        total = f * total + tl.sum(e, 1)
        largest = top

    out = partial + (tl.program_id(1).to(tl.int64) * count + rows) * 4
    tl.store(out, largest, mask=dense)
    tl.store(out + 1, total, mask=dense)
    tl.store(out + 2, weighted, mask=dense)
    tl.store(out + 3, chosen, mask=dense)


@triton.jit
def linear_merge(
    ids,
    mask,
    offsets,
    partial,
    values,
    entropy,
    states,
    count,
    vocabulary,
    splits,
    inverse,
    SPLITS: tl.constexpr,
):
    """Values of the dense rows from their splits, 0 where the mask is False; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SPLITS)
    present = at < splits
    one = row + tl.arange(0, 1)
    dense = dense_rows(mask, offsets, one, count)
    counted = dense_rows(mask, None, one, count)
    source = partial + (at.to(tl.int64) * count + row) * 4
    valid = present & (tl.max(dense.to(tl.int32), 0) > 0)
    largest = tl.load(source, mask=valid, other=LOWEST)
    total = tl.load(source + 1, mask=valid, other=0.0)
    weighted = tl.load(source + 2, mask=valid, other=0.0)
    chosen = tl.sum(tl.load(source + 3, mask=valid, other=0.0), 0)
    top, total, weighted = merge_lanes(largest, total, weighted, inverse, 0)
    log_total = tl.log(total)
    token = tl.load(ids + one, mask=dense, other=0)
    chosen = tl.where((token >= 0) & (token < vocabulary), chosen, float("nan"))
    value = (chosen - top) * inverse - log_total
    # Limited rows are the sparse kernels' business.
    ours = dense | ~counted
    tl.store(values + one, tl.where(counted, value, 0.0), mask=ours)
    tl.store(states + 2 * one, top, mask=ours)
    tl.store(states + 2 * one + 1, total, mask=ours)
    if entropy is not None:
        spread = log_total - weighted / total
        spread = tl.where(spread < 0.0, 0.0, spread)
        tl.store(entropy + one, tl.where(counted, spread, 0.0), mask=ours)


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
            hidden,
            weight,
            bias,
            rows,
            dense,
            columns,
            vocabulary,
            size,
            hidden_stride,
            weight_stride,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
            DOT,
            PRECISION,
        )
        token = tl.load(ids + rows, mask=dense, other=-1)
        incoming = tl.load(grad_values + rows, mask=dense, other=0.0)
        if grad_entropy is None:
            of_entropy = incoming * 0.0
            spread = incoming * 0.0
        else:
            of_entropy = tl.load(grad_entropy + rows, mask=dense, other=0.0)
            spread = tl.load(entropy + rows, mask=dense, other=0.0)
        top = tl.load(states + 2 * rows, mask=dense, other=0.0)
        total = tl.load(states + 2 * rows + 1, mask=dense, other=1.0)
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


# ---- rows limited to some ids ----


@triton.jit
def sparse_logits(
    hidden,
    weight,
    bias,
    mask,
    entry_row,
    entry_token,
    logits,
    entries,
    count,
    vocabulary,
    size,
    hidden_stride,
    weight_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The logit of every entry, in float32; NaN where its id does not exist."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    present = entry < entries
    row = tl.load(entry_row + entry, mask=present, other=0)
    token = tl.load(entry_token + entry, mask=present, other=0)
    valid = present & dense_rows(mask, None, row, count) & (token >= 0) & (token < vocabulary)
    acc = tl.zeros((BLOCK_E, BLOCK_H), tl.float32)
    for first in range(0, size, BLOCK_H):
        at = first + tl.arange(0, BLOCK_H)
        read = valid[:, None] & (at < size)[None, :]
        a = tl.load(hidden + row[:, None] * hidden_stride + at[None, :], mask=read, other=0.0)
        b = tl.load(weight + token[:, None] * weight_stride + at[None, :], mask=read, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    x = tl.sum(acc, 1)
    if bias is not None:
        x += tl.load(bias + token, mask=valid, other=0.0)
    tl.store(logits + entry, tl.where(valid, x, float("nan")), mask=present)


@triton.jit
def sparse_softmax(
    logits,
    ids,
    mask,
    offsets,
    entry_token,
    values,
    entropy,
    states,
    count,
    inverse,
    BLOCK: tl.constexpr,
):
    """Values of the limited rows; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    one = row + tl.arange(0, 1)
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    ours = dense_rows(mask, None, one, count) & (end > begin)
    end = tl.where(tl.max(ours.to(tl.int32), 0) > 0, end, begin)
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < end, other=float("-inf"))
        largest, total, weighted = add_logits(largest, total, weighted, x, inverse)
    top, total, weighted = merge_lanes(largest, total, weighted, inverse, 0)
    log_total = tl.log(total)
    token = tl.load(ids + one, mask=ours, other=-1)
    at = find(entry_token, begin, end, token)
    known = ours & contains(entry_token, begin, end, token)
    x = tl.load(logits + at, mask=known, other=float("-inf"))
    tl.store(values + one, (x - top) * inverse - log_total, mask=ours)
    tl.store(states + 2 * one, top, mask=ours)
    tl.store(states + 2 * one + 1, total, mask=ours)
    if entropy is not None:
        spread = log_total - weighted / total
        tl.store(entropy + one, tl.where(spread < 0.0, 0.0, spread), mask=ours)


@triton.jit
def sparse_grad_logits(
    grad_values,
    grad_entropy,
    logits,
    ids,
    mask,
    entry_row,
    entry_token,
    entropy,
    states,
    entry_grad,
    entries,
    count,
    inverse,
    BLOCK: tl.constexpr,
):
    """The gradient of every entry's logit; 0 in rows that do not count."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = entry < entries
    row = tl.load(entry_row + entry, mask=present, other=0)
    valid = present & dense_rows(mask, None, row, count)
    incoming = tl.load(grad_values + row, mask=valid, other=0.0)
    if grad_entropy is None:
        of_entropy = incoming * 0.0
        spread = incoming * 0.0
    else:
        of_entropy = tl.load(grad_entropy + row, mask=valid, other=0.0)
        spread = tl.load(entropy + row, mask=valid, other=0.0)
    x = tl.load(logits + entry, mask=valid, other=0.0)
    top = tl.load(states + 2 * row, mask=valid, other=0.0)
    total = tl.load(states + 2 * row + 1, mask=valid, other=1.0)
    gradient = gradient_of_logit(x, top, total, spread, incoming, of_entropy, inverse)
    own = tl.load(entry_token + entry, mask=present, other=-1) == tl.load(
        ids + row, mask=valid, other=-2
    )
    gradient += tl.where(own, incoming * inverse, 0.0)
    tl.store(entry_grad + entry, tl.where(valid, gradient, 0.0), mask=present)


@triton.jit
def sparse_grad_hidden(
    weight,
    mask,
    offsets,
    entry_token,
    entry_grad,
    grad_hidden,
    count,
    vocabulary,
    size,
    weight_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """``grad_hidden`` of the limited rows; a program per row and block of dimensions."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    ours = dense_rows(mask, None, row + tl.arange(0, 1), count) & (end > begin)
    end = tl.where(tl.max(ours.to(tl.int32), 0) > 0, end, begin)
    at = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_E, BLOCK_H), tl.float32)
    for first in range(begin, end, BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        token = tl.load(entry_token + entry, mask=entry < end, other=-1)
        gradient = tl.load(entry_grad + entry, mask=entry < end, other=0.0)
        valid = (token >= 0) & (token < vocabulary)
        w = tl.load(
            weight + token[:, None] * weight_stride + at[None, :],
            mask=valid[:, None] & (at < size)[None, :],
            other=0.0,
        )
        acc += gradient[:, None] * w.to(tl.float32)
    out = grad_hidden + row * size + at
    tl.store(out, tl.sum(acc, 0), mask=(at < size) & (end > begin))
