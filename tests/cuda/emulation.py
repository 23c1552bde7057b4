"""Compiles the shipped CUDA sources for the CPU emulator, and puts it in the GPU's place."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch

from deeprec.ops import cuda

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
# Objects by the hash of all that goes into them: an unchanged kernel is compiled once.
CACHE = ROOT / "build" / "emulator"

FLAGS = [
    *["-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"],
    *["-Wno-unknown-pragmas", "-DEMULATED_MODULE=emulated"],
]
FLAVOURS = {
    "plain": ["-O2", "-Wall", "-Wextra", "-Werror"],
    "address": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address"],
    "thread": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=thread", "-DEMULATOR_FINDS_RACES"],
}
# The scheduler hands memory from fiber to fiber as ThreadSanitizer would not: it is not watched.
UNWATCHED = {"fibers.cpp": "-fno-sanitize=thread"}
# Every order of threads and blocks, with asynchronous copies that land late and early.
SCHEDULES: list[dict[str, Any]] = [
    {"order": order, "seed": seed, "eager_copies": eager}
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2))
    for eager in (False, True)
]


def build(flavour: str = "plain", kernels: Path = ROOT / "csrc" / "cuda") -> Path:
    """The emulated extension of the .cu files and bindings of a folder, of what has changed.

    The folder's parent comes first on the include path, then the repository's csrc.
    """
    sources = [*kernels.glob("*.cu"), *kernels.glob("bindings*.cpp"), *EMULATOR.glob("*.cpp")]
    sources.sort()
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, kernels, flavour), sources))
    name = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:20]
    target = CACHE / f"{kernels.name}-{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        command = ["g++", "-shared", *FLAVOURS[flavour], *map(str, objects)]
        _into_place(target, command)
    return target


def load(path: Path) -> ModuleType:
    # pybind11 returns the module it has already made under a full name.
    name = f"{path.name.split('.')[0]}.emulated"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class EmulatedRuntime(cuda.Runtime):
    """CPU tensors, emulated kernels, a small device."""

    device_type = "cpu"

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels

    def why_not(self, device: torch.device) -> str | None:
        return None

    @contextmanager
    def on(self, device: torch.device) -> Iterator[cuda.Target]:
        yield cuda.Target(self.kernels, 0, 3)


@contextmanager
def emulating(kernels: ModuleType) -> Iterator[None]:
    """Within, ``backend="cuda"`` runs ``kernels`` on CPU tensors."""
    before = cuda._runtime
    cuda._runtime = EmulatedRuntime(kernels)
    try:
        yield
    finally:
        cuda._runtime = before


@cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _compile(source: Path, kernels: Path, flavour: str) -> Path:
    python, own = sysconfig.get_path("include"), str(kernels.parent)
    flags = [*FLAGS, *FLAVOURS[flavour], f"-I{own}", f"-I{ROOT / 'csrc'}", f"-I{EMULATOR}"]
    flags += ["-isystem", python, "-isystem", pybind11.get_include(), "-x", "c++"]
    flags += [UNWATCHED[source.name]] if source.name in UNWATCHED else []
    read = subprocess.run(
        ["g++", *flags, "-MM", str(source)], capture_output=True, text=True, check=False
    )
    if read.returncode:
        raise RuntimeError(read.stderr)
    files = shlex.split(read.stdout.replace("\\\n", " "))[1:]
    key = hashlib.sha256(_compiler().encode())
    for flag in flags:
        key.update(flag.replace(own, "").encode())
    for file in files:
        key.update(Path(file).read_bytes())
    target = CACHE / f"{source.stem}-{key.hexdigest()[:20]}.o"
    if not target.exists():
        _into_place(target, ["g++", *flags, "-c", str(source)])
    return target


def _into_place(target: Path, command: list[str]) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}.tmp")
    done = subprocess.run(
        [*command, "-o", str(unfinished)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    unfinished.replace(target)
