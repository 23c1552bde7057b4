"""``linear_logprobs`` of rows that are limited to some ids: one entry a permitted id.

Each entry is a dot product with one row of the weight, and the softmax of a row runs over its
entries alone. An id out of range among the permitted ones is left out; a token out of range has
value NaN, and one that is not permitted −inf.
"""

import triton
import triton.language as tl

from deeprec.kernels.linear_logprobs import dense_rows, of_rows
from deeprec.kernels.softmax import (
    LOWEST,
    add_logits,
    contains,
    find,
    gradient_of_logit,
    merge_lanes,
)


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
    """The logit of every entry, in float32; −inf where its id does not exist."""
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
    tl.store(logits + entry, tl.where(valid, x, float("-inf")), mask=present)


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
    vocabulary,
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
    x = tl.where((token >= 0) & (token < vocabulary), x, float("nan"))
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
    incoming, of_entropy, spread, top, total = of_rows(
        grad_values, grad_entropy, entropy, states, row, valid
    )
    x = tl.load(logits + entry, mask=valid, other=0.0)
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
