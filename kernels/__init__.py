"""Triton kernels, one module per op; ``deeprec.ops.OP_triton`` launches them."""

# Contraction into fused multiply-adds stays on, said aloud because Triton's default changes.
# Exact scores do not notice (their products are exact before they are added), and the bounds of
# the top-k prefilter hold either way.
LAUNCH = {"enable_fp_fusion": True}
