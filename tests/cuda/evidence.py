"""What the compiler made of the CUDA kernels, written to docs/gpu_evidence.json and .md.

``python tests/cuda/evidence.py`` reads the machine code in the built extension (``_C.cuda``) with
the cuobjdump that comes with Triton, or in cubins given as arguments, and how the launchers start
each kernel from the emulator. Nothing is timed: the last table is arithmetic.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from launches import direct_top_k, gather, indexed_top_k, launches, linear, short_names, trm

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
RESULT = ROOT / "docs" / "gpu_evidence.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")

# Instruction classes that are counted, by the first part of the opcode.
TENSOR = {"HMMA", "IMMA", "DMMA", "QMMA"}
CLASSES = {
    "tensor": TENSOR,
    "fp32": {"FFMA", "FADD", "FMUL"},
    "fp64": {"DFMA", "DADD", "DMUL"},
    "global load": {"LDG"},
    "async copy": {"LDGSTS"},
    "shared load": {"LDS", "LDSM"},
    "global store": {"STG"},
    "local": {"LDL", "STL"},
    "barrier": {"BAR"},
    "shuffle": {"SHFL"},
    "exp": {"MUFU"},
}


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a multiprocessor (CUDA C++ programming guide, compute capabilities)."""

    threads: int
    blocks: int
    shared: int  # bytes
    registers: int = 65536


LIMITS = {
    "sm_80": Multiprocessor(2048, 32, 164 << 10),
    "sm_90": Multiprocessor(2048, 32, 228 << 10),
    "sm_100": Multiprocessor(2048, 32, 228 << 10),
    "sm_120": Multiprocessor(1536, 24, 100 << 10),
}

# Kernels whose inner loops must be tensor-core instructions, with wide loads before them.
ON_TENSOR_CORES = ("topk_scan", "topk_sample", "linear_slice", "trm_dense")


@dataclass(frozen=True)
class Gpu:
    """Peaks of a data sheet, dense: bytes a second, int8, bf16 and tf32 operations a second."""

    bandwidth: float
    int8: float
    bf16: float
    tf32: float


GPUS = {
    "A100 80GB SXM": Gpu(2.039e12, 624e12, 312e12, 156e12),
    "H100 SXM": Gpu(3.35e12, 1979e12, 989e12, 494e12),
    "B200": Gpu(8.0e12, 4500e12, 2250e12, 1125e12),
}

# Bytes from memory and operations of a call at the sizes of docs/BENCHMARKS.md, by formula.
N, D, T, H, V = 1_000_000, 128, 2048, 576, 49_152
# The TRM's default sizes, users with 20 items each. A product of float32 is three of tf32.
USERS, ITEMS, INNER, TEXT, EXPERTS = 512, 20, 512, 384, 8
# Maps of a layer, D → 3 D → D → INNER → D; the last layer's only keys and values are of all items.
LAYER = D * (4 * D + 2 * INNER)
TRM_PRODUCTS = USERS * (ITEMS * (LAYER + 2 * D * D) + LAYER - 2 * D * D + EXPERTS * TEXT * D)
TRM_WEIGHTS = 2 * LAYER + EXPERTS * TEXT * D
TRM_IN_AND_OUT = USERS * (2 * ITEMS * D + TEXT + D)
WORK: list[tuple[str, float, float, str]] = [
    (f"top 20 of 1M x 128, codes, {b} queries", N * D * (1 + 1 / 16) + N * 0.375, 2 * N * D * b,
     "int8")
    for b in (1, 64, 256)
] + [
    ("gather_logprobs forward bf16", 2 * T * V, 0, "bf16"),
    ("gather_logprobs forward + backward bf16", 3 * 2 * T * V, 0, "bf16"),
    ("linear_logprobs forward bf16", 2 * (T * H + V * H), 2 * T * H * V, "bf16"),
    ("linear_logprobs forward + backward bf16", 2 * 2 * (T * H + V * H), 4 * 2 * T * H * V, "bf16"),
    ("trm_user_vectors 512 users x 20", 4 * (TRM_WEIGHTS + TRM_IN_AND_OUT), 3 * 2 * TRM_PRODUCTS,
     "tf32"),
]  # fmt: skip


def sources() -> list[Path]:
    """The kernels, their launchers, and what they include of csrc."""
    found: dict[Path, None] = {}
    rest = sorted(
        file
        for file in CUDA.iterdir()
        if file.suffix in (".cu", ".cuh", ".h") and not file.name.startswith("bindings")
    )
    while rest:
        file = rest.pop(0)
        found[file] = None
        included = re.findall(r'(?m)^#include "((?:cpu|cuda)/.+)"', file.read_text())
        rest += [path for name in included if (path := CUDA.parent / name) not in found]
    return list(found)


def sources_digest() -> str:
    digest = hashlib.sha256()
    for file in sources():
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def cuobjdump(*arguments: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise RuntimeError("cuobjdump comes with triton, which is not installed")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def blocks() -> dict[str, tuple[int, int]]:
    """Threads and dynamic shared memory with which the launchers start every kernel.

    At k = 20, 128 dimensions and the TRM's default sizes; the larger where there are several.
    """
    torch.manual_seed(0)
    found: dict[str, tuple[int, int]] = {}
    for launch in launches(
        lambda: direct_top_k(dim=128, k=20, rows=200, queries=9),
        lambda: direct_top_k(dim=128, k=1024, rows=200, queries=1),
        lambda: indexed_top_k(dim=128, k=20, rows=700, queries=17),
        lambda: gather(rows=2, vocabulary=300),
        lambda: linear(rows=3, size=36, vocabulary=150),
        lambda: trm(1, text_dim=12, max_length=3),
    ):
        own = (launch.threads, launch.shared)
        found[launch.kernel] = max(own, found.get(launch.kernel, own), key=lambda block: block[1])
    return found


def instructions(body: str) -> list[tuple[int, str, int | None]]:
    """Address, opcode, and the target of a branch."""
    found = []
    for line in re.finditer(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", body):
        target = re.search(r"0x([0-9a-f]+)", line[3]) if line[2].startswith("BRA") else None
        found.append((int(line[1], 16), line[2], int(target[1], 16) if target else None))
    return found


def mix(opcodes: list[str]) -> dict[str, int]:
    heads = Counter(opcode.split(".")[0] for opcode in opcodes)
    counts = {name: sum(heads[op] for op in ops) for name, ops in CLASSES.items()}
    wide = [op for op in opcodes if op.startswith(("LDG", "LDGSTS")) and ".128" in op]
    return {k: v for k, v in {**counts, "of them 128 bits": len(wide)}.items() if v}


def hottest_loop(listing: list[tuple[int, str, int | None]]) -> dict[str, int]:
    """The instruction mix of the innermost loop that has most tensor, else most fp instructions."""
    loops = [
        [op for address, op, _ in listing if target <= address <= end]
        for end, _, target in listing
        if target is not None and target < end
    ]

    def heat(loop: list[str]) -> tuple[float, float]:
        head = [op.split(".")[0] for op in loop]
        return (
            sum(op in TENSOR for op in head) / len(head),
            sum(op in CLASSES["fp64"] | CLASSES["fp32"] for op in head) / len(head),
        )

    return {"all": len(best := max(loops, key=heat)), **mix(best)} if loops else {}


def occupancy(architecture: str, registers: int, threads: int, shared: int) -> float:
    """Share of a multiprocessor's threads that are resident (256 registers are handed to a warp at
    a time; a block's shared memory costs 1 KiB more)."""
    limit, warps = LIMITS[architecture], threads // 32
    by_registers = limit.registers // (-(-registers * 32 // 256) * 256) // warps
    blocks = min(
        limit.blocks,
        limit.threads // threads,
        by_registers,
        limit.shared // (shared + 1024),
    )
    return round(blocks * threads / limit.threads, 2)


def read_kernels(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Per kernel and architecture: resources, instruction mixes, occupancy."""
    kernels: dict[str, dict[str, Any]] = {}
    started = blocks()
    for file in files:
        for architecture in ARCHITECTURES:
            usage = cuobjdump("-arch", architecture, "-res-usage", str(file))
            found = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
                               usage)  # fmt: skip
            if not found:
                continue
            names = short_names([entry[0] for entry in found])
            bodies = dict(
                re.findall(
                    r"Function : (\S+)(.*?)(?=Function : |\Z)",
                    cuobjdump("-arch", architecture, "-sass", str(file)),
                    re.DOTALL,
                )
            )
            for mangled, *numbers in found:
                registers, stack, shared, local = map(int, numbers)
                listing = instructions(bodies[mangled])
                entry: dict[str, Any] = {
                    "registers": registers,
                    "stack": stack,
                    "local": local,
                    "static_shared": shared,
                    "instructions": {"all": len(listing), **mix([op for _, op, _ in listing])},
                    "loop": hottest_loop(listing),
                }
                if names[mangled] in started:
                    threads, dynamic = started[names[mangled]]
                    entry |= {
                        "threads": threads,
                        "shared": dynamic,
                        "occupancy": occupancy(architecture, registers, threads, dynamic + shared),
                    }
                kernels.setdefault(names[mangled], {})[architecture] = entry
    return dict(sorted(kernels.items()))


def rooflines() -> list[dict[str, Any]]:
    rows = []
    for name, moved, operations, unit in WORK:
        row: dict[str, Any] = {"op": name, "bytes": moved, "operations": operations}
        row["operations_per_byte"] = round(operations / moved, 1)
        for gpu, peak in GPUS.items():
            memory, compute = moved / peak.bandwidth, operations / getattr(peak, unit)
            row[gpu] = {
                "limit": "memory" if memory >= compute else f"{unit} tensor cores",
                "floor_us": round(max(memory, compute) * 1e6, 1),
            }
        rows.append(row)
    return rows


def collect(files: list[Path]) -> dict[str, Any]:
    return {
        "sources": sources_digest(),
        "kernels": read_kernels(files),
        "rooflines": rooflines(),
    }


def problems(kernels: dict[str, dict[str, Any]]) -> list[str]:
    """What no kernel may have: a stack, spills, missing tensor-core instructions."""
    found = []
    for name, by_architecture in kernels.items():
        if missing := set(ARCHITECTURES) - set(by_architecture):
            found.append(f"{name}: not compiled for {', '.join(sorted(missing))}")
        for architecture, entry in by_architecture.items():
            where = f"{name}, {architecture}"
            if not entry.get("occupancy"):
                found.append(f"{where}: no launch is known that fits a multiprocessor")
            if entry["stack"] or entry["local"] or entry["instructions"].get("local"):
                found.append(f"{where}: {entry['stack']} bytes of stack, or local memory")
            if name.startswith(ON_TENSOR_CORES):
                if not entry["loop"].get("tensor"):
                    found.append(f"{where}: no tensor-core instruction in the inner loop")
                if not entry["instructions"].get("of them 128 bits"):
                    found.append(f"{where}: no 128-bit loads")
    return found


def markdown(evidence: dict[str, Any]) -> str:
    lines = [
        "# What the compiler made of the CUDA kernels",
        "",
        "Written by `python tests/cuda/evidence.py` from the machine code. Registers are a",
        "thread's, on sm_80 / 90 / 100 / 120; threads, shared memory (the launch's, in bytes) and",
        "occupancy (resident threads of a multiprocessor, by registers, shared memory and threads)",
        "are those of a launch at 128 dimensions, the largest where the launcher has several; the",
        "loop is the innermost one that does the arithmetic, on sm_80.",
        "",
        "Kernels that break a rule (no stack frame, spills or local memory; tensor cores and",
        "128-bit loads where the work is a product):",
        "",
        *[f"- {problem}" for problem in problems(evidence["kernels"])],
        "",
        "| kernel | registers | threads | shared | occupancy | loop |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, by_architecture in evidence["kernels"].items():
        entries = list(by_architecture.values())
        registers = " / ".join(str(e["registers"]) for e in entries)
        filled = " / ".join(f"{e['occupancy']:.0%}" for e in entries if "occupancy" in e)
        block = f"{entries[0].get('threads', '')} | {entries[0].get('shared', '')}"
        loop = ", ".join(f"{n} {what}" for what, n in entries[0]["loop"].items() if what != "all")
        lines.append(f"| `{name}` | {registers} | {block} | {filled} | {loop} |")
    lines += [
        "",
        "## Floors",
        "",
        "Arithmetic, not measurements: compulsory bytes and operations over data sheets' peaks.",
        "",
        "| op | ops / byte | " + " | ".join(GPUS) + " |",
        "| --- | --- |" + " --- |" * len(GPUS),
    ]
    for row in evidence["rooflines"]:
        cells = [f"{row[gpu]['floor_us']} µs, {row[gpu]['limit']}" for gpu in GPUS]
        lines.append(f"| {row['op']} | {row['operations_per_byte']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    files = [Path(argument) for argument in sys.argv[1:]]
    if not files:
        from deeprec import _C

        files = [Path(_C.__file__)]
    evidence = collect(files)
    RESULT.write_text(json.dumps(evidence, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(markdown(evidence))
    for problem in problems(evidence["kernels"]):
        print(problem)


if __name__ == "__main__":
    main()
