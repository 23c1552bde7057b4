"""Compile what the launchers launch, for a GPU that is not there.

Inside :func:`compiling_for` the launchers of ``deeprec.ops.*_triton`` run on CPU tensors; every
kernel they would launch is compiled for the target instead, an autotuned one in each of its
configurations. One process cannot both compile and interpret.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass
class Compiled:
    """One kernel in one configuration; ``config`` is empty where it has only one."""

    kernel: str
    config: dict[str, Any]
    binary: Any  # triton's CompiledKernel


class _Driver:
    """What Triton asks of a GPU when it compiles without launching."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device: each target is a device of its own.
        return [*TARGETS.values()].index(self.target)

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """Collects what the launches inside compile to."""
    found: list[Compiled] = []
    run_one, run_tuned = JITFunction.run, Autotuner.run

    def compile_one(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary = run_one(self, *args, grid=grid, warmup=True, **kwargs)
        meta = {name: value for name, value in kwargs.items() if not hasattr(value, "data_ptr")}
        found.append(Compiled(self.__name__, meta, binary))

    def compile_tuned(self: Any, *args: Any, **kwargs: Any) -> Any:
        for config in self.configs:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_one, compile_tuned
    triton.runtime.driver.set_active(_Driver(TARGETS[target]))
    try:
        yield found
    finally:
        JITFunction.run, Autotuner.run = run_one, run_tuned
