"""Freedom from data races of the shipped CUDA kernels, proven on their PTX by sentryward.

``python tests/cuda/races.py`` (minutes) compiles csrc/cuda to PTX, takes from the emulator what the
launchers pass to each kernel in a small call, and asks sentryward (PyPI) whether two threads can
touch the same memory unordered, in any schedule. It writes docs/gpu_races.json, of named kernels
only their part. A proof holds for
the sizes of its launch. What the tool cannot decide is written down with its reason: those kernels
rest on the emulator's schedules.

The PTX is the compiler's but for two changes that sentryward's inputs need: a struct among the
parameters becomes one parameter a field, and the test of a pointer's alignment becomes its result.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from evidence import CUDA, ROOT, sources_digest
from launches import Launch, direct_top_k, gather, indexed_top_k, launches, linear, short_names, trm

RESULT = ROOT / "docs" / "gpu_races.json"
# The architecture whose synchronisation sentryward models.
COMPILE = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-ptx", "-arch=compute_100a"]
# Whatever is larger is an address and no size.
ADDRESS = 1 << 32
FORMATS = {
    **{"u8": "<B", "b8": "<B", "s8": "<b", "u16": "<H", "b16": "<H", "u32": "<I", "b32": "<I"},
    **{"s32": "<i", "u64": "<Q", "b64": "<Q", "s64": "<q", "f32": "<f", "f64": "<d"},
}


def entries(ptx: str) -> dict[str, str]:
    """Each kernel of a PTX file as a module of its own, by mangled name; without debug lines."""
    text = re.sub(r"(?m)^\s*\.(loc|file)\b.*\n", "", re.split(r"\n\s*\.section\s+\.debug", ptx)[0])
    head, *parts = re.split(r"(?m)^(?=\s*(?:\.visible |\.weak )?\.(?:entry|func)\b)", text)
    named = {name[1]: part for part in parts if (name := re.search(r"\.entry\s+(\w+)\(", part))}
    return {name: head + part for name, part in named.items()}


class Specialised:
    """A kernel's PTX with the arguments of a launch: the module, and sentryward's input."""

    def __init__(self, ptx: str, launch: Launch) -> None:
        self.text = ptx
        self.arguments: list[dict[str, Any]] = []
        name = re.search(r"\.entry\s+(\w+)\(", ptx)
        assert name is not None
        self.prefix = name[1] + "_param_"
        for index, value in enumerate(launch.arguments):
            self._parameter(f"{self.prefix}{index}", value)
        self.input = {
            "schema": "spverify.kernel-input/v1",
            "launch": {
                "grid_dim": list(launch.grid),
                "block_dim": [launch.threads, 1, 1],
                "cluster_dim": [1, 1, 1],
                "dynamic_shared_bytes": launch.shared,
            },
            "arguments": self.arguments,
        }

    def _parameter(self, name: str, value: bytes) -> None:
        is_struct = re.search(rf"\.param \.align \d+ \.b8 {name}\[\d+\]", self.text)
        if not is_struct:
            kind = re.search(rf"\.param \.(\w+)[^\n]*? {name}\b", self.text)
            assert kind is not None
            self._argument(name, kind[1], value)
            return
        fields = self._fields(name)
        declared = [f".param .{kind} {name}_{at}" for at, kind in sorted(fields.items())]
        self.text = re.sub(
            rf"\.param \.align \d+ \.b8 {name}\[\d+\]",
            ",\n".join(declared) or f".param .u32 {name}_unused",
            self.text,
        )
        for at, kind in fields.items():
            self._argument(f"{name}_{at}", kind, value[at:])
        if not fields:
            self._argument(f"{name}_unused", "u32", bytes(4))

    def _fields(self, name: str) -> dict[int, str]:
        """Gives every field that is loaded a name of its own; their types by offset."""
        fields: dict[int, str] = {}
        aliases = "|".join(re.findall(rf"mov\.b64\s+(%\w+), {name};", self.text))

        def rename(load: re.Match[str]) -> str:
            kind, first = load[1], int(load[4] or 0)
            lines = []
            for i, register in enumerate(load[2].strip("{}").split(",")):
                at = first + i * struct.calcsize(FORMATS[kind])
                fields.setdefault(at, kind)
                lines.append(f"ld.param.{kind} {register.strip()}, [{name}_{at}];")
            return "\n".join(lines)

        source = f"{name}|{aliases}" if aliases else name
        self.text = re.sub(
            rf"ld\.param(?:\.v[24])?\.(\w+)\s+(\{{[^}}]*\}}|%\w+), \[({source})(?:\+(\d+))?\];",
            rename,
            self.text,
        )
        return fields

    def _argument(self, name: str, kind: str, value: bytes) -> None:
        number = struct.unpack_from(FORMATS[kind], value)[0]
        if kind not in ("u64", "b64") or 0 < number < ADDRESS:
            kind = kind.replace("b", "u")
            self.arguments.append({"parameter": name, "type": kind, "value": number})
            return
        # A zero may be a size as well as no address: it is the same to the kernel.
        pointer = f".param .u64 .ptr .global .align 16 {name}"
        self.text = re.sub(rf"\.param \.{kind}[^\n,]*? {name}\b", pointer, self.text, count=1)
        if number == 0:
            self.arguments.append({"parameter": name, "type": "pointer", "value": None})
            return
        for register in re.findall(rf"ld\.param\.\w+\s+(%\w+), \[{name}\];", self.text):
            test = rf"and\.b64\s+(%\w+), {register}, (\d+);"
            self.text = re.sub(test, lambda t: f"mov.b64 {t[1]}, {number & int(t[2])};", self.text)


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


def small_trm() -> list[Launch]:
    shape = {"text_dim": 12, "hidden": 40, "inner": 36, "n_heads": 2, "n_experts": 3}
    return launches(lambda: trm(2, **shape, max_length=5))


def small_launches() -> list[Launch]:
    torch.manual_seed(0)
    return small_trm() + launches(
        lambda: direct_top_k(dim=12, k=5, rows=70, queries=3),
        lambda: indexed_top_k(dim=12, k=5, rows=600, queries=17),
        lambda: gather(rows=2, vocabulary=300),
        lambda: linear(rows=3, size=36, vocabulary=150),
    )


def check(ptx: str, launched: list[Launch], seconds: int = 300) -> dict[str, Any]:
    """The verdict on the first launch that sentryward can decide, else on the last."""
    found: dict[str, Any] = {"result": "not launched"}
    for launch in launched:
        found = check_launch(Specialised(ptx, launch), launch, seconds)
        if found["result"] in ("race_free", "potential_race", "not_wellsynced"):
            break
    return found


def check_launch(kernel: Specialised, launch: Launch, seconds: int) -> dict[str, Any]:
    from sentryward import verify

    with tempfile.TemporaryDirectory() as folder:
        module, config = Path(folder) / "kernel.ptx", Path(folder) / "input.json"
        module.write_text(kernel.text)
        config.write_text(json.dumps(kernel.input))
        answer = verify(module, input=config, timeout_seconds=seconds)
    found = {"result": answer["result"], "grid": list(launch.grid), "threads": launch.threads}
    if answer["result"] != "race_free":
        found["why"] = [
            f"{d.get('code')}: {d.get('message', '')}" for d in answer.get("diagnostics", [])[:1]
        ]
    return found


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
    arguments = parser.parse_args()
    launched = by_kernel(small_launches())
    modules = {
        name: ptx
        for name, ptx in sorted(compile_ptx().items())
        if not arguments.kernels or any(part in name for part in arguments.kernels)
    }

    def checked(name: str) -> dict[str, Any]:
        found = check(modules[name], launched.get(name, []), arguments.seconds)
        print(name, json.dumps(found), flush=True)
        return found

    with ThreadPoolExecutor(arguments.jobs) as pool:
        kernels = dict(zip(modules, pool.map(checked, modules), strict=True))
    digest = sources_digest()
    if arguments.kernels and RESULT.exists():
        stored = json.loads(RESULT.read_text())
        if stored["sources"] == digest:
            kernels = {**stored["kernels"], **kernels}
    evidence = {"sources": digest, "sentryward": version("sentryward"), "kernels": kernels}
    RESULT.write_text(json.dumps(evidence, indent=1) + "\n")


if __name__ == "__main__":
    main()
