"""A pytest plugin: ``backend="cuda"`` runs on CPU tensors, so that tests of the ops include it."""

from __future__ import annotations

import pytest
from emulation import EmulatedRuntime, build, load

from deeprec.ops import cuda


def pytest_configure(config: pytest.Config) -> None:
    kernels = load(build())
    kernels.set_schedule("shuffled", seed=3)
    cuda._runtime = EmulatedRuntime(kernels)
