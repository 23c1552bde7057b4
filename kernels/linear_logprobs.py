"""Log-probs of tokens under ``hidden @ weight.T + bias``; the logits exist a tile at a time.

A program takes a block of rows and SPLIT columns of the vocabulary, keeps the softmax online, and
a second kernel merges the splits. Sums run over splits of fixed width in a fixed order, so that a
row's value is the same in any batch. Offsets are 64-bit. The idea: Dao et al., FlashAttention
(2022), for the online softmax over tiles.

Rows limited to some ids are those of ``linear_logprobs_limited``; the gradients of all others are
in ``linear_logprobs_backward``.
"""

import triton
import triton.language as tl

from deeprec.kernels.product import product_tile
from deeprec.kernels.softmax import LOWEST, merge_lanes

# Columns a program of the forward pass goes through. A multiple of every BLOCK_V; small enough
# that a few hundred rows of a 50,000-word vocabulary fill a large GPU.
SPLIT = 4096
# Two tiles: the larger reuses operands best, the smaller fills the GPU when rows are few. Warps are
# as many as keep float32 products (three in tf32) from spilling, on every target.
LARGE = triton.Config({"BLOCK_T": 64, "BLOCK_V": 128}, num_warps=8, num_stages=3)
SMALL = {"BLOCK_T": 64, "BLOCK_V": 64}
FORWARD_TILES = [triton.Config(SMALL, num_warps=8, num_stages=3), LARGE]
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
    hidden_rows,
    dense,
    weight,
    bias,
    columns,
    vocabulary,
    size,
    weight_stride,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits in float32 of the rows that ``hidden_rows`` points to; −inf beyond the vocabulary."""
    inside = columns < vocabulary
    weight_rows = weight + columns.to(tl.int64) * weight_stride
    x = product_tile(hidden_rows, dense, weight_rows, inside, size, BLOCK_H, DOT, PRECISION)
    if bias is not None:
        x += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    return tl.where(inside[None, :], x, float("-inf"))


@triton.jit
def of_rows(grad_values, grad_entropy, entropy, states, rows, valid):
    """What the backward pass is told of a row.

    The value's gradient, the entropy's, the entropy, the largest logit, Σ e.
    """
    incoming = tl.load(grad_values + rows, mask=valid, other=0.0)
    if grad_entropy is None:
        of_entropy = incoming * 0.0
        spread = incoming * 0.0
    else:
        of_entropy = tl.load(grad_entropy + rows, mask=valid, other=0.0)
        spread = tl.load(entropy + rows, mask=valid, other=0.0)
    top = tl.load(states + 2 * rows, mask=valid, other=0.0)
    total = tl.load(states + 2 * rows + 1, mask=valid, other=1.0)
    return incoming, of_entropy, spread, top, total


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
    # Limited rows are the business of kernels of their own.
    ours = dense | ~counted
    tl.store(values + one, tl.where(counted, value, 0.0), mask=ours)
    tl.store(states + 2 * one, tl.where(counted, top, 0.0), mask=ours)
    tl.store(states + 2 * one + 1, tl.where(counted, total, 1.0), mask=ours)
    if entropy is not None:
        spread = log_total - weighted / total
        spread = tl.where(spread < 0.0, 0.0, spread)
        tl.store(entropy + one, tl.where(counted, spread, 0.0), mask=ours)
