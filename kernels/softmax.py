"""The online softmax that every log-prob kernel shares (Milakov and Gimelshein, 2018).

A lane keeps the largest logit that it has seen, Σ e and Σ e·d, where d = (x − largest) / T and
e = exp(d). The maximum is kept in units of the logits, so that x − largest is exact for near
values, whatever the temperature.
"""

import triton
import triton.language as tl

# Below every float32 but −inf, which adds nothing to a sum.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def add_logits(largest, total, weighted, x, inverse):
    """The lanes' state once each has seen one more logit; inverse = 1 / T.

    One exponential a logit: either the logit or the old sum is rescaled, never both. NaN stays.
    """
    above = x > largest
    d = -tl.abs(x - largest) * inverse
    e = tl.exp(d)
    # Where e underflows, e·d is 0 and not 0·inf.
    ed = tl.where(e == 0.0, 0.0, e * d)
    weighted = tl.where(above, e * weighted + ed * total, weighted + ed)
    total = tl.where(above, total * e + 1.0, total + e)
    return tl.where(above, x, largest), total, weighted


@triton.jit
def merge_lanes(largest, total, weighted, inverse, axis: tl.constexpr):
    """Maximum, Σ e and Σ e·d over the lanes of an axis; NaN sums where there is no softmax.

    There is none when a logit is NaN or +inf, or when all are −inf.
    """
    top = tl.max(largest, axis, keep_dims=True)
    d = (largest - top) * inverse
    e = tl.exp(d)
    ed = tl.where(e == 0.0, 0.0, e * d)
    weighted = tl.sum(e * weighted + ed * total, axis, keep_dims=True)
    total = tl.sum(total * e, axis, keep_dims=True)
    total = tl.where((total > 0.0) & (top < float("inf")), total, float("nan"))
    return top, total, weighted


@triton.jit
def gradient_of_logit(x, largest, total, entropy, grad_values, grad_entropy, inverse):
    """∂loss/∂logit through the softmax: −p·(Σ grad_values + grad_entropy·(log p + H)) / T."""
    d = (x - largest) * inverse
    e = tl.exp(d)
    slope = grad_values + grad_entropy * (d - tl.log(total) + entropy)
    # A logit of −inf has no gradient; where the row has no softmax, total is NaN and says so.
    return -inverse * tl.where(e == 0.0, 0.0 * total, e / total * slope)


@triton.jit
def find(sorted_ids, begin, end, wanted):
    """Where ``wanted`` (a block) would stand in the ascending ids ``[begin, end)``."""
    low = begin + wanted * 0
    high = end + wanted * 0
    width = end - begin
    while width > 0:
        middle = (low + high) // 2
        active = low < high
        right = active & (tl.load(sorted_ids + middle, mask=active, other=0) < wanted)
        low = tl.where(right, middle + 1, low)
        high = tl.where(active & ~right, middle, high)
        width = width // 2
    return low


@triton.jit
def contains(sorted_ids, begin, end, wanted):
    """Which of ``wanted`` (a block) are among the ascending ids ``[begin, end)``."""
    at = find(sorted_ids, begin, end, wanted)
    return (at < end) & (tl.load(sorted_ids + at, mask=at < end, other=0) == wanted)
