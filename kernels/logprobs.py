"""Log-probs of given tokens under logits, forward and backward.

Forward, a program a row: one read of the row, the softmax kept online per lane. Backward, a
program per row and block of logits, then the rows' own tokens, whose gradient is one term longer.
Offsets into the logits are 64-bit; a row is at most 2^31 logits.
"""

import triton
import triton.language as tl

from deeprec.kernels.softmax import (
    LOWEST,
    add_logits,
    contains,
    gradient_of_logit,
    merge_lanes,
)

# A lane handles BLOCK / threads logits a step: 8 or 16 of them are one or two 128-bit loads of
# 16-bit logits, two or four of float32 ones. More would only cost registers.
FORWARD_CONFIGS = [
    triton.Config({"BLOCK": 1024}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK": 4096}, num_warps=8, num_stages=2),
]
BACKWARD_CONFIGS = [
    triton.Config({"BLOCK": 1024}, num_warps=4),
    triton.Config({"BLOCK": 4096}, num_warps=8),
]
# Tokens of a row handled together: one row rarely has more.
TOKENS = 16


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """Offset of a row of ``[outer, inner, V]``, in elements."""
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def row_extent(offsets, row, vocabulary):
    """Where a row's permitted ids begin, how many logits its softmax covers, if it is limited."""
    if offsets is None:
        begin = tl.full((), 0, tl.int64)
        count = tl.full((), 0, tl.int64) + vocabulary
        limited = begin != 0
    else:
        begin = tl.load(offsets + row)
        permitted = tl.load(offsets + row + 1) - begin
        limited = permitted > 0
        count = tl.where(limited, permitted, vocabulary)
    return begin, count, limited


@triton.jit
def columns_of(permitted, begin, limited, at, valid):
    """Which logits the positions ``at`` of a row stand for."""
    if permitted is None:
        columns = at
    else:
        chosen = tl.load(permitted + begin + at, mask=valid & limited, other=0)
        columns = tl.where(limited, chosen, at)
    return columns


@triton.autotune(configs=FORWARD_CONFIGS, key=["vocabulary"])
@triton.jit
def gather_forward(
    logits,
    ids,
    mask,
    offsets,
    permitted,
    values,
    entropy,
    states,
    inner,
    outer_stride,
    inner_stride,
    vocabulary,
    tokens,
    inverse,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    counted = tl.full((), 1, tl.int1)
    if mask is not None:
        counted = tl.load(mask + row) != 0
    begin, count, limited = row_extent(offsets, row, vocabulary)
    count = tl.where(counted, count, 0)
    start = row_start(row, inner, outer_stride, inner_stride)

    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        valid = at < count
        columns = columns_of(permitted, begin, limited, at, valid)
        valid = valid & (columns < vocabulary)
        x = tl.load(logits + start + columns, mask=valid, other=float("-inf")).to(tl.float32)
        largest, total, weighted = add_logits(largest, total, weighted, x, inverse)
    top, total, weighted = merge_lanes(largest, total, weighted, inverse, 0)
    log_total = tl.log(total)

    for first in range(0, tokens, TOKENS):
        at = first + tl.arange(0, TOKENS)
        present = (at < tokens) & counted
        token = tl.load(ids + row * tokens + at, mask=present, other=0)
        inside = (token >= 0) & (token < vocabulary)
        # An id that does not exist makes its value NaN: nothing is read out of bounds.
        x = tl.load(logits + start + token, mask=present & inside, other=float("nan"))
        x = x.to(tl.float32)
        if permitted is not None:
            # An empty range for rows without restriction: nothing is searched.
            end = begin + tl.where(limited & counted, count, 0)
            known = contains(permitted, begin, end, token) | ~limited
            x = tl.where(known | ~inside, x, float("-inf"))
        value = tl.where(counted, (x - top) * inverse - log_total, 0.0)
        tl.store(values + row * tokens + at, value, mask=at < tokens)

    one = tl.arange(0, 1)
    tl.store(states + 2 * row + one, tl.where(counted, top, 0.0))
    tl.store(states + 2 * row + 1 + one, tl.where(counted, total, 1.0))
    if entropy is not None:
        spread = log_total - weighted / total
        # Rounding may leave a certain row a hair below 0; NaN stays.
        spread = tl.where(spread < 0.0, 0.0, spread)
        tl.store(entropy + row + one, tl.where(counted, spread, 0.0))


@triton.jit
def row_slope(grad_values, grad_entropy, entropy, row, tokens, TOKENS: tl.constexpr):
    """Σ of a row's incoming gradients, the entropy's gradient, the entropy."""
    incoming = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, tokens, TOKENS):
        at = first + tl.arange(0, TOKENS)
        incoming += tl.load(grad_values + row * tokens + at, mask=at < tokens, other=0.0)
    if grad_entropy is None:
        of_entropy = tl.full((), 0.0, tl.float32)
        spread = tl.full((), 0.0, tl.float32)
    else:
        of_entropy = tl.load(grad_entropy + row)
        spread = tl.load(entropy + row)
    return tl.sum(incoming, 0), of_entropy, spread


@triton.autotune(configs=BACKWARD_CONFIGS, key=["vocabulary"])
@triton.jit
def gather_backward(
    grad_values,
    grad_entropy,
    logits,
    mask,
    offsets,
    permitted,
    entropy,
    states,
    grad_logits,
    inner,
    outer_stride,
    inner_stride,
    vocabulary,
    tokens,
    inverse,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, count, limited = row_extent(offsets, row, vocabulary)
    if mask is not None:
        count = tl.where(tl.load(mask + row) != 0, count, 0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    columns = columns_of(permitted, begin, limited, at, valid)
    valid = valid & (columns < vocabulary)
    slope, of_entropy, spread = row_slope(grad_values, grad_entropy, entropy, row, tokens, TOKENS)
    start = row_start(row, inner, outer_stride, inner_stride)
    x = tl.load(logits + start + columns, mask=valid, other=float("-inf")).to(tl.float32)
    top = tl.load(states + 2 * row)
    total = tl.load(states + 2 * row + 1)
    gradient = gradient_of_logit(x, top, total, spread, slope, of_entropy, inverse)
    out = grad_logits + row * vocabulary + columns
    tl.store(out, gradient.to(grad_logits.dtype.element_ty), mask=valid)


@triton.jit
def gather_backward_tokens(
    grad_values,
    grad_entropy,
    logits,
    ids,
    mask,
    offsets,
    permitted,
    entropy,
    states,
    grad_logits,
    inner,
    outer_stride,
    inner_stride,
    vocabulary,
    tokens,
    inverse,
    TOKENS: tl.constexpr,
):
    """Overwrites the gradient at a row's own tokens, which :func:`gather_backward` left out.

    A token that comes several times gets the sum of its gradients, several times the same.
    """
    row = tl.program_id(0).to(tl.int64)
    begin, count, limited = row_extent(offsets, row, vocabulary)
    counted = tl.full((), 1, tl.int1)
    if mask is not None:
        counted = tl.load(mask + row) != 0
    at = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    token = tl.load(ids + row * tokens + at, mask=(at < tokens) & counted, other=-1)
    valid = (token >= 0) & (token < vocabulary)
    if permitted is not None:
        end = begin + tl.where(limited & counted, count, 0)
        valid = valid & (contains(permitted, begin, end, token) | ~limited)

    own = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, tokens, TOKENS):
        other = first + tl.arange(0, TOKENS)
        here = (other < tokens) & counted
        other_token = tl.load(ids + row * tokens + other, mask=here, other=-2)
        gradient = tl.load(grad_values + row * tokens + other, mask=here, other=0.0)
        same = token[:, None] == other_token[None, :]
        own += tl.sum(tl.where(same, gradient[None, :], 0.0), 1)

    slope, of_entropy, spread = row_slope(grad_values, grad_entropy, entropy, row, tokens, TOKENS)
    start = row_start(row, inner, outer_stride, inner_stride)
    x = tl.load(logits + start + token, mask=valid, other=float("-inf")).to(tl.float32)
    top = tl.load(states + 2 * row)
    total = tl.load(states + 2 * row + 1)
    gradient = gradient_of_logit(x, top, total, spread, slope, of_entropy, inverse)
    gradient += inverse * own
    out = grad_logits + row * vocabulary + token
    tl.store(out, gradient.to(grad_logits.dtype.element_ty), mask=valid)
