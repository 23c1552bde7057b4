"""The ops of the emulated CUDA kernels as torch sees them."""

from __future__ import annotations

import gpu_trm
import opchecks
import pytest


# opcheck traces with symbols, whose warning about .grad of tensors that are no leaves is torch's.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "check",
    [opchecks.check_gather, opchecks.check_linear, opchecks.check_topk, gpu_trm.check_opcheck],
)
def test_opcheck(emulated, check) -> None:
    check("cuda")
