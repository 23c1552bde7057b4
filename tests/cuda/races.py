"""Freedom from data races of the shipped CUDA kernels, proven on their PTX by sentryward.

``python tests/cuda/races.py`` (minutes) compiles csrc/cuda to PTX, takes from the emulator what the
launchers pass to each kernel in a small call, and asks sentryward (PyPI) whether two threads can
touch the same memory unordered, in any schedule. It writes docs/gpu_races.json, of named kernels
only their part. A proof holds for the sizes of its launch. What the tool cannot decide is written
down with its reason: those kernels rest on the emulator's schedules.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from evidence import CUDA, ROOT, sources_digest
from launches import SMALL, Launch, launches, short_names
from specialised_ptx import Specialised, entries, source_line

DECIDED = ("race_free", "potential_race", "not_wellsynced")
RESULT = ROOT / "docs" / "gpu_races.json"
# The architecture whose synchronisation sentryward models.
COMPILE = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-ptx", "-lineinfo"]
COMPILE += ["-arch=compute_100a"]


def by_kernel(found: list[Launch]) -> dict[str, list[Launch]]:
    """The launches of each kernel, those alike but for values once, the simplest first."""
    kinds: dict[str, dict[Any, Launch]] = {}
    for launch in found:
        # Which arguments there are decides what a kernel does.
        given = tuple(tuple(word != 0 for word in words(a)) for a in launch.arguments)
        kinds.setdefault(launch.kernel, {}).setdefault(given, launch)
    return {
        kernel: sorted(
            own.values(), key=lambda launch: sum(w != 0 for a in launch.arguments for w in words(a))
        )
        for kernel, own in kinds.items()
    }


def words(argument: bytes) -> tuple[int, ...]:
    whole = argument + bytes(-len(argument) % 8)
    return struct.unpack(f"<{len(whole) // 8}Q", whole)


def small_launches() -> list[Launch]:
    torch.manual_seed(0)
    return launches(*SMALL)


def check(ptx: str, launched: list[Launch], seconds: int = 300) -> dict[str, Any]:
    """The verdict on the first launch that sentryward can decide, else why it decides none."""
    found: dict[str, Any] = {"result": "not launched"}
    reasons: dict[str, None] = {}  # in order
    for launch in launched:
        found = check_launch(Specialised(ptx, launch), launch, seconds)
        if found["result"] in DECIDED:
            return found
        reasons |= dict.fromkeys(found["why"])
    return {**found, "why": list(reasons)}


def check_launch(kernel: Specialised, launch: Launch, seconds: int) -> dict[str, Any]:
    from sentryward import verify

    with tempfile.TemporaryDirectory() as folder:
        module, config = Path(folder) / "kernel.ptx", Path(folder) / "input.json"
        module.write_text(kernel.text)
        config.write_text(json.dumps(kernel.input))
        answer = verify(module, input=config, timeout_seconds=seconds)
    found = {"result": answer["result"], "grid": list(launch.grid), "threads": launch.threads}
    if answer["result"] != "race_free":
        found["why"] = [reason(kernel.text, said) for said in answer.get("diagnostics", [])[:1]]
    return found


def reason(text: str, diagnostic: dict[str, Any]) -> str:
    """What the tool says, and the source line it says it of."""
    why = f"{diagnostic.get('code')}: {diagnostic.get('message', '')}"
    place = diagnostic.get("details", {}).get("location")
    return f"{why} ({source_line(text, place['line'])})" if place else why


def compile_ptx(folder: Path = CUDA, files: str = "*.cu") -> dict[str, str]:
    """Every kernel's PTX by short name."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob(files)):
        with tempfile.NamedTemporaryFile(suffix=".ptx") as out:
            command = ["nvcc", *COMPILE, f"-I{folder.parent}", f"-I{ROOT / 'csrc'}", str(file)]
            subprocess.run([*command, "-o", out.name], check=True)
            modules = entries(Path(out.name).read_text())
        names = short_names(list(modules))
        found |= {names[mangled]: text for mangled, text in modules.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="*", help="parts of names; all kernels if there is none")
    parser.add_argument("--seconds", type=int, default=300, help="time for a launch")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--sources", type=Path, default=CUDA, help="a copy whose verdicts are only printed"
    )
    arguments = parser.parse_args()
    launched = by_kernel(small_launches())
    modules = {
        name: ptx
        for name, ptx in sorted(compile_ptx(arguments.sources).items())
        if not arguments.kernels or any(part in name for part in arguments.kernels)
    }

    def checked(name: str) -> dict[str, Any]:
        found = check(modules[name], launched.get(name, []), arguments.seconds)
        print(name, json.dumps(found), flush=True)
        return found

    with ThreadPoolExecutor(arguments.jobs) as pool:
        kernels = dict(zip(modules, pool.map(checked, modules), strict=True))
    if arguments.sources != CUDA:
        return
    digest = sources_digest()
    if arguments.kernels and RESULT.exists():
        stored = json.loads(RESULT.read_text())
        if stored["sources"] == digest:
            kernels = {**stored["kernels"], **kernels}
    evidence = {"sources": digest, "sentryward": version("sentryward"), "kernels": kernels}
    RESULT.write_text(json.dumps(evidence, indent=1) + "\n")


if __name__ == "__main__":
    main()
