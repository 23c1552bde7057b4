"""The preference-aware TRM: histories to states, states and preferences to user vectors.

The items of all users lie one after the other, so that products run over items alone and nothing
is computed for padding: ``starts[user]`` is where a user's begin, the last entry how many there
are, which only the device knows. Activations are float32; products multiply in the dtype of the
weights. All sums of a row run in an order of their own, the same in any batch.

1. ``embed``: item and adapted text are gathered, convolved over the positions, gated, and the
   position added, and normalised: one pass over a history, nothing else is written.
2. Per layer ``dense`` (queries, keys, values), ``attention``, ``dense_norm`` (output, residual,
   LayerNorm), ``dense`` (with gelu), ``dense_norm``; the products are in ``deeprec.kernels.dense``.
   Only the last position of a user is read, so the last layer has one query a user:
   ``attention_of_last``.
3. ``fuse``: the adaptor's gates, the gated sum of its experts, LayerNorm.
"""

import triton
import triton.language as tl

from deeprec.kernels.dense import normalize

# A history's positions that a program convolves at once: more reuse an item's row, fewer fill the
# GPU.
EMBED_CONFIGS = [
    triton.Config({"BLOCK_T": 4}, num_warps=4),
    triton.Config({"BLOCK_T": 8}, num_warps=8),
]
ATTENTION_CONFIGS = [
    triton.Config({"BLOCK_Q": 16}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_Q": 32}, num_warps=8, num_stages=2),
]


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def item_at(history, position, length, n_items):
    """The ids at positions of a history; 0 beyond its end, and for ids that do not exist."""
    item = tl.load(history + position, mask=position < length, other=0)
    return tl.where((item >= 0) & (item <= n_items), item, 0)


@triton.autotune(configs=EMBED_CONFIGS, key=["hidden", "period"])
@triton.jit
def embed(
    items,
    texts,
    kernel,
    gates,
    gate_bias,
    positions,
    norm_weight,
    norm_bias,
    history,
    starts,
    out,
    n_items,
    width,
    period,
    hidden,
    fused_scale,
    eps,
    PADDING_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Input of the encoder, float32 ``[items of all users, hidden]``.

    ``kernel`` is the learned filter in time, ``[period, hidden]``. With PADDING_ROW the tables'
    rows 0 are not zero, and padding takes part in the convolutions.
    """
    user = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + user)
    length = (tl.load(starts + user + 1) - start).to(tl.int32)
    first = tl.program_id(1) * BLOCK_T
    if first < length:
        history += user * width
        t = first + tl.arange(0, BLOCK_T)
        h = tl.arange(0, BLOCK_H)
        wanted = t < length
        real = h < hidden
        filtered = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        fused = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        sources = length
        if PADDING_ROW:
            sources = period
        for source in range(0, sources):
            item = item_at(history, source, length, n_items)
            x = tl.load(items + item * hidden + h, mask=real, other=0.0)[None, :]
            shift = t - source
            shift = tl.where(shift < 0, shift + period, shift)
            tap = tl.load(
                kernel + shift[:, None] * hidden + h[None, :],
                mask=wanted[:, None] & real[None, :],
                other=0.0,
            )
            filtered += x * tap
            other = item_at(history, shift, length, n_items)
            text = tl.load(
                texts + other[:, None] * hidden + h[None, :],
                mask=(wanted & (shift < sources))[:, None] & real[None, :],
                other=0.0,
            )
            fused += x * text
        fused *= fused_scale
        gate = tl.load(gates + h, mask=real, other=0.0)
        of_filtered = sigmoid(tl.sum(filtered * gate[None, :], 1) + tl.load(gate_bias))
        gate = tl.load(gates + hidden + h, mask=real, other=0.0)
        of_fused = sigmoid(tl.sum(fused * gate[None, :], 1) + tl.load(gate_bias + 1))
        x = 2.0 * (filtered * of_filtered[:, None] + fused * of_fused[:, None])
        x += tl.load(
            positions + t[:, None] * hidden + h[None, :],
            mask=wanted[:, None] & real[None, :],
            other=0.0,
        )
        y = normalize(x, h, hidden, norm_weight, norm_bias, eps)
        tl.store(
            out + (start + t)[:, None] * hidden + h[None, :],
            y,
            mask=wanted[:, None] & real[None, :],
        )


@triton.autotune(configs=ATTENTION_CONFIGS, key=["hidden", "head", "BLOCK_S"])
@triton.jit
def attention(
    projected,
    starts,
    out,
    hidden,
    head,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Softmax attention within each history, a head and BLOCK_Q queries a program.

    ``projected`` holds queries, keys and values, ``[items, 3, heads, head]``. A history's scores
    are a tile: BLOCK_S is at least the longest.
    """
    user = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + user)
    length = (tl.load(starts + user + 1) - start).to(tl.int32)
    first = tl.program_id(2) * BLOCK_Q
    if first < length:
        q = first + tl.arange(0, BLOCK_Q)
        s = tl.arange(0, BLOCK_S)
        begin = tl.program_id(1) * head
        queries = projected + (start + q) * 3 * hidden + begin
        keys = projected + (start + s) * 3 * hidden + hidden + begin
        score = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
        for at in range(0, head, BLOCK_D):
            d = at + tl.arange(0, BLOCK_D)
            a = tl.load(
                queries[:, None] + d[None, :],
                mask=(q < length)[:, None] & (d < head)[None, :],
                other=0.0,
            )
            b = tl.load(
                keys[None, :] + d[:, None],
                mask=(s < length)[None, :] & (d < head)[:, None],
                other=0.0,
            )
            score = tl.dot(a, b, score, input_precision=PRECISION)
        score = tl.where((s < length)[None, :], score * scale, float("-inf"))
        p = tl.exp(score - tl.max(score, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        for at in range(0, head, BLOCK_D):
            d = at + tl.arange(0, BLOCK_D)
            v = tl.load(
                keys[:, None] + hidden + d[None, :],
                mask=(s < length)[:, None] & (d < head)[None, :],
                other=0.0,
            )
            y = tl.dot(p, v, input_precision=PRECISION)
            tl.store(
                out + (start + q)[:, None] * hidden + begin + d[None, :],
                y,
                mask=(q < length)[:, None] & (d < head)[None, :],
            )


@triton.jit
def attention_of_last(
    queries,
    projected,
    starts,
    out,
    hidden,
    head,
    scale,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query a user: ``queries`` ``[users, hidden]``, ``projected`` keys and values of items."""
    user = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + user)
    length = (tl.load(starts + user + 1) - start).to(tl.int32)
    s = tl.arange(0, BLOCK_S)
    begin = tl.program_id(1) * head
    keys = projected + (start + s) * 2 * hidden + begin
    score = tl.zeros((BLOCK_S,), tl.float32)
    for at in range(0, head, BLOCK_D):
        d = at + tl.arange(0, BLOCK_D)
        q = tl.load(queries + user * hidden + begin + d, mask=d < head, other=0.0)
        k = tl.load(
            keys[:, None] + d[None, :], mask=(s < length)[:, None] & (d < head)[None, :], other=0.0
        )
        score += tl.sum(q[None, :] * k, 1)
    score = tl.where(s < length, score * scale, float("-inf"))
    p = tl.exp(score - tl.max(score, 0))
    p = p / tl.sum(p, 0)
    for at in range(0, head, BLOCK_D):
        d = at + tl.arange(0, BLOCK_D)
        v = tl.load(
            keys[:, None] + hidden + d[None, :],
            mask=(s < length)[:, None] & (d < head)[None, :],
            other=0.0,
        )
        tl.store(out + user * hidden + begin + d, tl.sum(p[:, None] * v, 0), mask=d < head)


@triton.jit
def fuse(
    states,
    projected,
    norm_weight,
    norm_bias,
    users,
    hidden,
    n_experts,
    eps,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """LayerNorm(states + Σ gate · expert), a program a user.

    ``projected`` is what experts and gates make of the preference, ``[users, experts · hidden +
    experts]``; None where there is no preference.
    """
    user = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    real = h < hidden
    x = tl.load(states + user * hidden + h, mask=real, other=0.0)
    if projected is not None:
        projected += user * n_experts * (hidden + 1)
        e = tl.arange(0, BLOCK_E)
        logit = tl.load(projected + n_experts * hidden + e, mask=e < n_experts, other=float("-inf"))
        top = tl.max(logit, 0)
        total = tl.sum(tl.exp(logit - top), 0)
        adapted = tl.zeros((BLOCK_H,), tl.float32)
        for expert in range(0, n_experts):
            weight = tl.exp(tl.load(projected + n_experts * hidden + expert) - top)
            adapted += weight * tl.load(projected + expert * hidden + h, mask=real, other=0.0)
        x += adapted / total
    # LayerNorm of one row: ``normalize`` of a tile [1, H] costs six times the registers.
    mean = tl.sum(x, 0) / hidden
    centred = tl.where(real, x - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / hidden + eps)
    scale = tl.load(norm_weight + h, mask=real, other=0.0)
    shift = tl.load(norm_bias + h, mask=real, other=0.0)
    tl.store(users + user * hidden + h, centred / deviation * scale + shift, mask=real)
