"""Linear maps of float32 rows, with what follows them: gelu, or residual and LayerNorm.

Products multiply in the dtype of the weights and add in float32. Which rows there are may be known
to the device alone.
"""

import triton
import triton.language as tl

from deeprec.kernels.product import product_tile

# Rows are few in serving, so that the smaller tile often wins.
DENSE_CONFIGS = [
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=8, num_stages=3),
]
# A tile holds whole rows, of up to 512: 16 or 32 registers of sums a thread. More would spill where
# float32 is multiplied in three parts, and a third stage would not fit an MI300's shared memory.
DENSE_NORM_CONFIGS = [
    triton.Config({"BLOCK_M": 16}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_M": 16}, num_warps=16, num_stages=2),
]


@triton.jit
def normalize(x, channels, hidden, weight, bias, eps):
    """LayerNorm of the rows of ``[rows, channels]``, whose channels beyond ``hidden`` are 0."""
    real = channels < hidden
    mean = tl.sum(x, 1) / hidden
    centred = tl.where(real[None, :], x - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / hidden + eps)
    y = centred / deviation[:, None]
    # Loaded where they are used: earlier they cost dense_norm a block a multiprocessor on sm_80.
    scale = tl.load(weight + channels, mask=real, other=0.0)
    shift = tl.load(bias + channels, mask=real, other=0.0)
    return y * scale[None, :] + shift[None, :]


@triton.jit
def rows_that_exist(total, rows):
    """How many rows there are: what the device has counted, where it has."""
    if total is not None:
        rows = tl.load(total).to(tl.int32)
    return rows


@triton.autotune(configs=DENSE_CONFIGS, key=["inputs", "outputs"])
@triton.jit
def dense(
    x,
    weight,
    bias,
    chosen,
    total,
    out,
    rows,
    inputs,
    outputs,
    GELU: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = x Wᵀ + b, or gelu of it (by erf); row i is made of row ``chosen[i]`` of x."""
    count = rows_that_exist(total, rows)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = row < count
    if tl.program_id(0) * BLOCK_M < count:
        source = row.to(tl.int64)
        if chosen is not None:
            source = tl.load(chosen + row, mask=present, other=0)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns < outputs
        y = product_tile(
            x + source * inputs,
            present,
            weight + columns.to(tl.int64) * inputs,
            inside,
            inputs,
            BLOCK_K,
            DOT,
            PRECISION,
        )
        if bias is not None:
            y += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
        if GELU:
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        tl.store(
            out + row[:, None].to(tl.int64) * outputs + columns[None, :],
            y,
            mask=present[:, None] & inside[None, :],
        )


@triton.autotune(configs=DENSE_NORM_CONFIGS, key=["inputs", "outputs"])
@triton.jit
def dense_norm(
    x,
    weight,
    bias,
    residual,
    chosen,
    norm_weight,
    norm_bias,
    total,
    out,
    rows,
    inputs,
    outputs,
    eps,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = LayerNorm(x Wᵀ + b + residual), where row i gets row ``chosen[i]`` of the residual.

    A tile holds whole rows: BLOCK_N is at least ``outputs``. ``out`` is not ``residual``: tuning
    runs a kernel more than once.
    """
    count = rows_that_exist(total, rows)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = row < count
    if tl.program_id(0) * BLOCK_M < count:
        columns = tl.arange(0, BLOCK_N)
        inside = columns < outputs
        y = product_tile(
            x + row.to(tl.int64) * inputs,
            present,
            weight + columns.to(tl.int64) * inputs,
            inside,
            inputs,
            BLOCK_K,
            DOT,
            PRECISION,
        )
        y += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
        valid = present[:, None] & inside[None, :]
        source = row.to(tl.int64)
        if chosen is not None:
            source = tl.load(chosen + row, mask=present, other=0)
        y += tl.load(residual + source[:, None] * outputs + columns[None, :], mask=valid, other=0.0)
        y = normalize(y, columns, outputs, norm_weight, norm_bias, eps)
        tl.store(out + row[:, None].to(tl.int64) * outputs + columns[None, :], y, mask=valid)
