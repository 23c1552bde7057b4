"""Options shared by all tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that train for minutes")
    parser.addoption(
        "--peers", action="store_true", help="also run tests that install other libraries"
    )
    parser.addoption(
        "--emulator",
        choices=["plain", "address", "thread"],
        default="plain",
        help="sanitizer of the emulated CUDA kernels (its runtime must be preloaded)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for option in ("slow", "peers"):
            if item.get_closest_marker(option) and not config.getoption(f"--{option}"):
                item.add_marker(pytest.mark.skip(reason=f"run with --{option}"))
