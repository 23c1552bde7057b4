"""Exact top-k retrieval: a cheap scan finds the groups that matter, fp64 decides among them.

1. ``scan``: approximate scores on tensor cores, a tile at a time. Every score comes with a bound on
   everything that separates it from the exact score, the tensor cores' own rounding and the final
   rounding to float32 included. Kept are, per query and group of GROUP items, the largest lower
   and the largest upper bound; excluded items count for neither.
2. ``choose``: the k-th largest lower bound of a query's groups is a threshold. At least k distinct
   items score as much or more, so an item of the answer lies in a group whose upper bound reaches
   it. Those groups are listed.
3. ``rescore``: exact scores, in the order of additions that ``deeprec.ops.reference.topk`` spells
   out, of every item in a listed group; score and index become one sortable 64-bit key.
4. ``select`` and ``order``: the k largest keys, in order.

A query with more groups than the list holds (many equal scores, say) goes through ``exhaust``
instead of 3: it scores every item, a part of them a program, and hands on the best of each part.
It returns at once for all other queries. So the answer is exact whatever the data, and nothing
waits for the host.

**The bound.** With q and x the query and the item, n(q) and n(x) upper bounds of their norms, and
u = 2^-24: rounding or truncating both operands to a mantissa of 11 bits (tf32; fp16 items are exact
in it) or the query to bfloat16's 8 bits (bfloat16 items are exact) changes a product q_d·x_d by at
most OPERANDS·|q_d·x_d|, so the sum by OPERANDS·n(q)·n(x) (Cauchy-Schwarz). A sum of D products in
float32, in any order, rounded or truncated to the largest term's last place, is off by at most
D·2^-21·n(q)·n(x); rounding the exact score to float32 by u·n(q)·n(x), and computing the bounds by a
few u more. Products that underflow add at most D·2^-120·(1 + n(q) + n(x)), far above what flushing
subnormal operands or products can lose. Where a norm's square leaves float32's range, the bounds
are infinite and the group is a candidate; so it is with NaN.
"""

import triton
import triton.language as tl

from deeprec.kernels.softmax import find

# Items of a group. Small groups are scored exactly at little cost, large ones are few.
GROUP = 32
# What rounding the operands may change: two truncations to tf32, 2^-10 each and their product; or
# one to bfloat16, 2^-7.
OPERANDS_TF32 = tl.constexpr(2.0**-9 + 2.0**-19)
OPERANDS_BF16 = tl.constexpr(2.0**-7 + 2.0**-19)
PER_DIMENSION = tl.constexpr(2.0**-21)
FEW_ROUNDINGS = tl.constexpr(2.0**-20)
UNDERFLOW = tl.constexpr(2.0**-120)
# Norms from here on multiply to near the largest float32.
HUGE = tl.constexpr(2.0**120)
LOWEST_KEY = tl.constexpr(-(2**63))
# An index takes 31 bits of a key, which order it descending. Below them is the sign of a zero.
INDEX_MASK = tl.constexpr(2**31 - 1)

SCAN_CONFIGS = [
    triton.Config({"BLOCK_N": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_N": 128}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_N": 256}, num_warps=8, num_stages=3),
]


@triton.jit
def excluded(offsets, ids, queries, present, first, index, BLOCK_N: tl.constexpr):
    """``[queries, BLOCK_N]``: which of the items ``first …`` a query must not be answered with."""
    begin = tl.load(offsets + queries, mask=present, other=0)
    end = tl.load(offsets + queries + 1, mask=present, other=0)
    # Two binary searches in every row at once; rows are short, so the longest decides.
    low = lower_bound(ids, begin, end, first)
    high = lower_bound(ids, low, end, first + BLOCK_N)
    gone = (queries[:, None] < 0) & (index[None, :] < 0)
    for step in range(0, tl.max(high - low, 0)):
        here = low + step < high
        item = tl.load(ids + low + step, mask=here, other=-1)
        gone = gone | (item[:, None] == index[None, :])
    return gone


@triton.jit
def lower_bound(ids, begin, end, wanted):
    """First position in ``[begin, end)``, row by row, of an id of at least ``wanted``."""
    low = begin
    high = end
    width = tl.max(end - begin, 0)
    while width > 0:
        middle = (low + high) // 2
        active = low < high
        right = active & (tl.load(ids + middle, mask=active, other=0) < wanted)
        low = tl.where(right, middle + 1, low)
        high = tl.where(active & ~right, middle, high)
        width = width // 2
    return low


@triton.jit
def upper_norm(squares, size):
    """An upper bound of a norm from float32 sums of squares; they lose little, and underflow."""
    return tl.sqrt(squares) * (1.0 + size * 2.0**-22 + 2.0**-20) + size * 2.0**-60


@triton.autotune(configs=SCAN_CONFIGS, key=["size", "BLOCK_B"])
@triton.jit
def scan(
    queries,
    items,
    offsets,
    ids,
    lower,
    upper,
    batch,
    count,
    size,
    groups,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    query = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    present = query < batch
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    index = first + tl.arange(0, BLOCK_N)
    inside = index < count
    score = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    query_squares = tl.zeros((BLOCK_B,), tl.float32)
    item_squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, size, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        q = tl.load(
            queries + query[:, None] * size + at[None, :],
            mask=present[:, None] & (at < size)[None, :],
            other=0.0,
        )
        x = tl.load(
            items + index[None, :] * size + at[:, None],
            mask=inside[None, :] & (at < size)[:, None],
            other=0.0,
        )
        score = tl.dot(q.to(DOT), x.to(DOT), score, input_precision=PRECISION)
        x = x.to(tl.float32)
        query_squares += tl.sum(q * q, 1)
        item_squares += tl.sum(x * x, 0)

    query_norm = upper_norm(query_squares, size)
    item_norm = upper_norm(item_squares, size)
    if tl.bfloat16 == DOT:
        relative = OPERANDS_BF16 + FEW_ROUNDINGS + size * PER_DIMENSION
    else:
        relative = OPERANDS_TF32 + FEW_ROUNDINGS + size * PER_DIMENSION
    product = query_norm[:, None] * item_norm[None, :]
    error = product * relative + (1.0 + query_norm[:, None] + item_norm[None, :]) * (
        size * UNDERFLOW
    )
    # False for NaN as well. Norms have a limit of their own: operands of products may not overflow.
    safe = (product < HUGE) & (query_norm < HUGE)[:, None] & (item_norm < HUGE)[None, :]
    low = tl.where(safe, score - error, float("-inf"))
    high = tl.where(safe, score + error, float("inf"))

    gone = ~inside[None, :] | ~present[:, None]
    if ids is not None:
        gone = gone | excluded(offsets, ids, query, present, first, index, BLOCK_N)
    low = tl.where(gone, float("-inf"), low)
    high = tl.where(gone, float("-inf"), high)
    low = tl.max(tl.reshape(low, (BLOCK_B, BLOCK_N // GROUP, GROUP)), 2)
    high = tl.max(tl.reshape(high, (BLOCK_B, BLOCK_N // GROUP, GROUP)), 2)
    group = tl.program_id(0) * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    out = query[:, None] * groups + group[None, :]
    valid = present[:, None] & (group < groups)[None, :]
    tl.store(lower + out, low, mask=valid)
    tl.store(upper + out, high, mask=valid)


@triton.jit
def sortable(value):
    """int32 that orders as the float32 does; −0 as +0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def pack(value, index):
    """int64 that orders by value, then by index descending; the last bit tells −0 from +0."""
    negative_zero = value.to(tl.int32, bitcast=True) == -(2**31)
    low = ((INDEX_MASK - index) << 1) | negative_zero.to(tl.int64)
    return (sortable(value).to(tl.int64) << 32) | low


@triton.jit
def choose(
    lower,
    upper,
    listed,
    found,
    groups,
    k,
    capacity,
    BLOCK: tl.constexpr,
):
    """Lists the groups that may hold an answer; ``found`` counts them, −1 where too many do."""
    query = tl.program_id(0).to(tl.int64)
    begin = query * groups
    lowest = tl.full((), -(2**31), tl.int64)
    threshold = lowest
    for bit in range(0, 32):
        trial = threshold + (tl.full((), 1, tl.int64) << (31 - bit))
        enough = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, groups, BLOCK):
            at = first + tl.arange(0, BLOCK)
            low = tl.load(lower + begin + at, mask=at < groups, other=float("-inf"))
            known = (at < groups) & (sortable(low).to(tl.int64) >= trial)
            enough += known.to(tl.int32)
        threshold = tl.where(tl.sum(enough, 0) >= k, trial, threshold)

    total = tl.full((), 0, tl.int32)
    for first in range(0, groups, BLOCK):
        at = first + tl.arange(0, BLOCK)
        high = tl.load(upper + begin + at, mask=at < groups, other=float("-inf"))
        # −inf marks a group of which nothing is left.
        keep = (sortable(high).to(tl.int64) >= threshold) & (high != float("-inf"))
        keep = keep & (at < groups)
        place = total + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(listed + query * capacity + place, at, mask=keep & (place < capacity))
        total += tl.sum(keep.to(tl.int32), 0)
    tl.store(found + query, tl.where(total > capacity, -1, total))


@triton.jit
def exact_keys(
    queries,
    items,
    offsets,
    ids,
    query,
    first,
    present,
    count,
    size,
    BLOCK: tl.constexpr,
):
    """Exact keys of the items ``first … first + BLOCK``; the lowest for those that do not count."""
    index = first + tl.arange(0, BLOCK).to(tl.int64)
    inside = (index < count) & present
    lane = tl.arange(0, 8)
    acc = tl.zeros((BLOCK, 8), tl.float64)
    for start in range(0, size, 8):
        at = start + lane
        q = tl.load(queries + query * size + at, mask=at < size, other=0.0).to(tl.float64)
        x = tl.load(
            items + index[:, None] * size + at[None, :],
            mask=inside[:, None] & (at < size)[None, :],
            other=0.0,
        )
        # Products of float32 are exact in float64, fused or not.
        acc += q[None, :] * x.to(tl.float64)
    # ((0+4)+(2+6)) + ((1+5)+(3+7)): every sum is of two numbers, so it has one order.
    four = tl.sum(tl.reshape(acc, (BLOCK, 2, 4)), 1)
    two = tl.sum(tl.reshape(four, (BLOCK, 2, 2)), 1)
    value = tl.sum(two, 1).to(tl.float32)
    key = pack(value, index)
    if ids is not None:
        begin = tl.load(offsets + query)
        end = tl.load(offsets + query + 1)
        at = find(ids, begin, end, index)
        known = (at < end) & (tl.load(ids + at, mask=at < end, other=-1) == index)
        key = tl.where(known, LOWEST_KEY, key)
    return tl.where(inside, key, LOWEST_KEY)


@triton.jit
def rescore(
    queries,
    items,
    offsets,
    ids,
    listed,
    found,
    keys,
    count,
    size,
    capacity,
    GROUP: tl.constexpr,
):
    """Exact keys of a listed group; a program per query and place in the list."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    if place < tl.load(found + query):
        group = tl.load(listed + query * capacity + place).to(tl.int64)
        key = exact_keys(
            queries, items, offsets, ids, query, group * GROUP, group >= 0, count, size, GROUP
        )
        out = (query * capacity + place) * GROUP + tl.arange(0, GROUP)
        tl.store(keys + out, key)


@triton.jit
def exhaust(
    queries,
    items,
    offsets,
    ids,
    found,
    keys,
    count,
    size,
    capacity,
    part,
    GROUP: tl.constexpr,
    K: tl.constexpr,
):
    """The K best keys of ``part`` items (a multiple of K), for queries whose list overflowed."""
    query = tl.program_id(0).to(tl.int64)
    if tl.load(found + query) < 0:
        best = tl.full((K,), LOWEST_KEY, tl.int64)
        begin = tl.program_id(1).to(tl.int64) * part
        for first in range(begin, tl.minimum(begin + part, count), K):
            key = exact_keys(queries, items, offsets, ids, query, first, first >= 0, count, size, K)
            if tl.max(key, 0) > tl.min(best, 0):
                # The larger of each pair from a descending and an ascending run: the K largest.
                best = tl.maximum(best, tl.sort(key))
                best = tl.sort(best, descending=True)
        out = query * capacity * GROUP + tl.program_id(1) * K + tl.arange(0, K)
        tl.store(keys + out, best)


@triton.jit
def select(
    found,
    keys,
    chosen,
    rescored,
    count,
    capacity,
    k,
    exhausted,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The k largest of a query's keys, in any order, to ``chosen[query, :K]``.

    ``exhausted`` is the number of keys of a query whose list overflowed.
    """
    query = tl.program_id(0).to(tl.int64)
    groups = tl.load(found + query)
    total = tl.where(groups < 0, exhausted, groups * GROUP)
    begin = query * capacity * GROUP
    # Bit by bit from the top: a bit is set where at least k keys are as large with it. Two's
    # complement counts upwards from the lowest number, the sign bit included.
    threshold = tl.full((), LOWEST_KEY, tl.int64)
    for bit in range(0, 64):
        trial = threshold + (tl.full((), 1, tl.int64) << (63 - bit))
        enough = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, total, BLOCK):
            at = first + tl.arange(0, BLOCK)
            key = tl.load(keys + begin + at, mask=at < total, other=LOWEST_KEY)
            enough += (key >= trial).to(tl.int32)
        threshold = tl.where(tl.sum(enough, 0) >= k, trial, threshold)

    # Keys differ, the lowest apart, so at most k reach the threshold.
    kept = tl.full((), 0, tl.int32)
    for first in range(0, total, BLOCK):
        at = first + tl.arange(0, BLOCK)
        key = tl.load(keys + begin + at, mask=at < total, other=LOWEST_KEY)
        keep = (key >= threshold) & (key != LOWEST_KEY)
        place = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(chosen + query * K + place, key, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
    rest = tl.arange(0, K)
    tl.store(chosen + query * K + rest, LOWEST_KEY, mask=rest >= kept)
    scored = tl.where(groups < 0, tl.full((), 0, tl.int64) + count, total)
    tl.store(rescored + query, scored)


@triton.jit
def order(chosen, values, indices, k, K: tl.constexpr):
    """Sorts a query's K keys and writes the first k; −inf and −1 where no item is left."""
    query = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, K)
    key = tl.sort(tl.load(chosen + query * K + at), descending=True)
    bits = (key >> 32).to(tl.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    value = tl.where((value == 0.0) & ((key & 1) != 0), -0.0, value)
    index = INDEX_MASK - ((key >> 1) & INDEX_MASK)
    none = key == LOWEST_KEY
    tl.store(values + query * k + at, tl.where(none, float("-inf"), value), mask=at < k)
    tl.store(indices + query * k + at, tl.where(none, -1, index), mask=at < k)
