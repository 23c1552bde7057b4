"""The C++ of exact top-k under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fopenmp", "-I", str(ROOT / "csrc")]


def isa_flags() -> dict[str, list[str]]:
    """What CMakeLists.txt compiles each instruction set's file with."""
    found: dict[str, list[str]] = {}
    text = (ROOT / "CMakeLists.txt").read_text()
    for name, value in re.findall(r"set\(DEEPREC_FLAGS_(\w+)([^)]*)\)", text):
        flags: list[str] = []
        for word in value.replace('"', "").split():
            other = re.fullmatch(r"\$\{DEEPREC_FLAGS_(\w+)\}", word)
            flags += found[other[1]] if other else [word]
        found[name] = flags
    return found


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64"
)
def test_no_sanitizer_finds_anything(tmp_path: Path) -> None:
    cpu = ROOT / "csrc" / "cpu"
    sources = {cpu / f"topk_{isa}.cpp": flags for isa, flags in isa_flags().items()}
    for name in ("isa", "topk", "topk_encode", "topk_queries"):
        sources[cpu / f"{name}.cpp"] = []
    sources[ROOT / "tests" / "cpp" / "topk_sanitize.cpp"] = []

    def build(job: tuple[Path, list[str]]) -> str:
        source, flags = job
        target = str(tmp_path / f"{source.stem}.o")
        subprocess.run(
            ["g++", *FLAGS, *SANITIZE, *flags, "-c", str(source), "-o", target], check=True
        )
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources.items()))
    program = tmp_path / "topk_sanitize"
    subprocess.run(["g++", "-fopenmp", *SANITIZE, *objects, "-o", str(program)], check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # libgomp keeps its threads
    result = subprocess.run(
        [str(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "ok\n"
