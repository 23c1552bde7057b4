"""The tile of a product that every linear map is made of."""

import triton
import triton.language as tl


@triton.jit
def product_tile(
    left,
    here,
    right,
    inside,
    depth,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``[M, N]`` dot products in float32 of the M rows at ``left`` and the N rows at ``right``.

    ``left`` and ``right`` are pointers to the first of a row's ``depth`` numbers, which lie side by
    side; rows that are not ``here`` or not ``inside`` are not read and give 0.
    """
    acc = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    for first in range(0, depth, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        known = at < depth
        a = tl.load(left[:, None] + at[None, :], mask=here[:, None] & known[None, :], other=0.0)
        b = tl.load(right[None, :] + at[:, None], mask=inside[None, :] & known[:, None], other=0.0)
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)
    return acc
