"""Fixtures that run ``backend="cuda"`` on the CPU emulator.

``emulated`` runs one schedule; ``every_schedule`` repeats the test under all of them. With
``--emulator address`` either runs kernels compiled with AddressSanitizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from emulation import SCHEDULES, build, emulating, load


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """The emulated extension, compiled once."""
    return load(build(request.config.getoption("--emulator")))


@pytest.fixture
def emulated(kernels: ModuleType) -> Iterator[ModuleType]:
    kernels.set_schedule("shuffled", seed=3)
    with emulating(kernels):
        yield kernels


def _name(schedule: dict[str, object]) -> str:
    copies = "early" if schedule["eager_copies"] else "late"
    return f"{schedule['order']}{schedule['seed']}-{copies}"


@pytest.fixture(params=SCHEDULES, ids=_name)
def every_schedule(request: pytest.FixtureRequest, emulated: ModuleType) -> ModuleType:
    emulated.set_schedule(**request.param)
    return emulated
