"""What the compilers make of every Triton kernel, in every configuration, for every target.

``python tests/kernels/triton_evidence.py --write`` compiles all of them (minutes) and writes
``docs/gpu_evidence_triton.json`` and the table of ``docs/TRITON.md``, what ``--targets`` and
``--cases`` leave out as it was; without ``--write`` it only compiles, checks, and demands that what
is written is of the same kernels and of these sources. No GPU is needed, and nothing is timed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton_compile import TARGETS, Compiled, compiling_for

from deeprec.ops import topk_triton
from deeprec.trm import PreferenceAwareTRM, TRMConfig, packed_triton
from deeprec.trm.request import Request

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "gpu_evidence_triton.json"
TABLE = ROOT / "docs" / "TRITON.md"
MARK = "<!-- table: tests/kernels/triton_evidence.py --write -->\n"
# What one block may use, in bytes, and what a multiprocessor has: CUDA programming guide, table of
# compute capabilities; AMD CDNA 3 ISA guide.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
SHARED_TOTAL = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "sm_120": 100 << 10}
MAX_WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}
REGISTERS = 65536
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma|v_smfmac)")
WIDE_LOAD = re.compile(
    r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|global_load_dwordx4|cp\.async"
)
# Kernels whose products must be on tensor cores.
PRODUCTS = {
    "linear_forward",
    "linear_grad_logits",
    "linear_grad_hidden",
    "linear_grad_weight",
    "scan",
    "dense",
    "dense_norm",
    "attention",
}


def gather(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 4096, dtype=dtype)
    ids, mask = torch.zeros(4, 1, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    allowed = (torch.arange(5), torch.arange(4))
    problem = (logits, ids, 1.0, mask, *allowed)
    forward = torch.ops.deeprec.gather_logprobs_triton(*problem, True)
    torch.ops.deeprec.gather_logprobs_triton_backward(*forward[:2], *problem, *forward[1:])


def linear(dtype: torch.dtype) -> None:
    hidden, weight = torch.zeros(16, 256, dtype=dtype), torch.zeros(4096, 256, dtype=dtype)
    ids, bias, mask = torch.zeros(16).long(), torch.zeros(4096), torch.ones(16, dtype=torch.bool)
    allowed = (torch.arange(17), torch.arange(16))
    problem = (hidden, weight, ids, bias, 1.0, mask, *allowed)
    forward = torch.ops.deeprec.linear_logprobs_triton(*problem, True)
    torch.ops.deeprec.linear_logprobs_triton_backward(
        *forward[:2], *problem, *forward[1:], [True] * 3
    )


def topk(dtype: torch.dtype, k: int) -> None:
    queries, items = torch.zeros(64, 128), torch.zeros(1 << 16, 128, dtype=dtype)
    topk_triton.run(queries, items, None, torch.arange(65), torch.arange(64), k)


def trm(dtype: torch.dtype, **options: int) -> None:
    config = TRMConfig(n_items=100, text_dim=384, **options)
    packed = PreferenceAwareTRM(config).eval().pack(dtype)
    history, lengths = torch.ones(4, config.max_length).long(), torch.ones(4).long()
    asked = Request(history, lengths, preference=torch.zeros(4, config.text_dim))
    packed_triton._user_vectors(packed, asked)


CASES: dict[str, Callable[[], None]] = {
    "gather_logprobs bfloat16": lambda: gather(torch.bfloat16),
    "gather_logprobs float32": lambda: gather(torch.float32),
    "linear_logprobs bfloat16": lambda: linear(torch.bfloat16),
    "linear_logprobs float32": lambda: linear(torch.float32),
    "topk_retrieve bfloat16, k 20": lambda: topk(torch.bfloat16, 20),
    "topk_retrieve float32, k 1000": lambda: topk(torch.float32, 1000),
    "trm bfloat16": lambda: trm(torch.bfloat16),
    "trm float32, as large as it may be": lambda: trm(
        torch.float32, hidden=512, inner=2048, n_experts=16, max_length=128
    ),
}


def sources_digest() -> str:
    """Of the kernels; what launches them shows in the configurations that are compiled."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "kernels").glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def resources(compiled: Compiled, target: str) -> dict[str, int]:
    """Registers a thread, bytes of stack, spilled registers."""
    asm = compiled.binary.asm
    if "cubin" not in asm:
        text = asm["amdgcn"]

        def field(name: str) -> int:
            return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", text))

        return {
            "registers": field("vgpr_count"),
            "stack": field("private_segment_fixed_size"),
            "spills": field("vgpr_spill_count"),
        }
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    # What ptxas spills goes to the stack: there is no other local memory in a Triton kernel.
    return {
        "registers": used["REG"],
        "stack": used["STACK"],
        "spills": (used["STACK"] + used["LOCAL"]) // 4,
    }


def row(case: str, target: str, compiled: Compiled) -> dict[str, Any]:
    asm, metadata = compiled.binary.asm, compiled.binary.metadata
    text = asm.get("ptx") or asm["amdgcn"]
    found = resources(compiled, target)
    threads = metadata.num_warps * TARGETS[target].warp_size
    products = TENSOR_CORES.search(text)
    shown = {
        name: value
        for name, value in compiled.config.items()
        if name.startswith(("BLOCK", "K")) or name in ("num_warps", "num_stages", "PRECISION")
    }
    result = {
        "case": case,
        "kernel": compiled.kernel,
        "target": target,
        "config": shown,
        "threads": threads,
        **found,
        "shared": metadata.shared,
        "tensor_cores": products.group(1) if products else None,
        "wide_loads": len(WIDE_LOAD.findall(text)),
    }
    result["blocks_per_multiprocessor"] = blocks(result)
    return result


def blocks(r: dict[str, Any]) -> int:
    """How many of a kernel's blocks are on a multiprocessor (AMD: compute unit) at once."""
    target, registers = r["target"], -(-r["registers"] // 8) * 8  # given out 8 a thread at a time
    if target in MAX_WARPS:
        by_registers = REGISTERS // (registers * r["threads"])
        by_shared = SHARED_TOTAL[target] // (r["shared"] + 1024)  # 1 KB of a block is reserved
        by_warps = MAX_WARPS[target] * 32 // r["threads"]
        return int(min(by_registers, by_shared, by_warps))
    # Four units of 512 registers a lane, for up to 8 waves of 64 each.
    waves = 4 * min(512 // registers, 8)
    return int(min(waves * 64 // r["threads"], SHARED_LIMIT[target] // max(r["shared"], 1)))


def compile_case(task: tuple[str, str]) -> list[dict[str, Any]]:
    case, target = task
    with compiling_for(target) as found:
        CASES[case]()
    rows: dict[str, dict[str, Any]] = {}
    for compiled in found:
        result = row(case, target, compiled)
        key = compiled.kernel + json.dumps(result["config"], sort_keys=True)
        # The same kernel launched twice may differ in what is known of its arguments.
        if key not in rows or rows[key]["registers"] < result["registers"]:
            rows[key] = result
    return list(rows.values())


def identity(r: dict[str, Any]) -> list[Any]:
    """What does not depend on the version of a compiler."""
    return [r[name] for name in ("case", "kernel", "target", "config", "threads")]


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What no kernel may do."""
    bad = []
    for r in rows:
        where = f"{r['case']}: {r['kernel']} {r['config']} on {r['target']}"
        if r["stack"] or r["spills"]:
            bad.append(f"{where}: {r['stack']} bytes of stack, {r['spills']} spilled registers")
        if r["shared"] > SHARED_LIMIT[r["target"]]:
            bad.append(f"{where}: {r['shared']} bytes of shared memory do not fit")
        if r["kernel"] in PRODUCTS and not r["tensor_cores"]:
            bad.append(f"{where}: no tensor core instruction")
        if r["blocks_per_multiprocessor"] < 1:
            bad.append(f"{where}: not one block fits a multiprocessor")
    return bad


def table(rows: list[dict[str, Any]]) -> str:
    """The worst configuration of every kernel and target."""
    lines = ["| kernel | target | registers | shared memory, bytes | blocks per multiprocessor |"]
    lines.append("|---|---|---|---|---|")
    worst: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in rows:
        worst.setdefault((r["kernel"], r["target"]), []).append(r)
    for (kernel, target), group in worst.items():
        registers = max(r["registers"] for r in group)
        shared = max(r["shared"] for r in group)
        fewest = min(r["blocks_per_multiprocessor"] for r in group)
        lines.append(f"| {kernel} | {target} | {registers} | {shared:,} | {fewest} |")
    return "\n".join(lines) + "\n"


def compile_all(jobs: int, targets: list[str], cases: list[str]) -> list[dict[str, Any]]:
    tasks = [(case, target) for target in targets for case in cases]
    # Fresh processes: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return [r for rows in pool.map(compile_case, tasks, chunksize=1) for r in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the evidence")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], choices=[*TARGETS])
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES])
    arguments = parser.parse_args()
    evidence, digest = json.loads(EVIDENCE.read_text()), sources_digest()
    fresh = evidence.get("sources") == digest
    if (
        arguments.write
        and not fresh
        and (arguments.targets, arguments.cases)
        != (
            [*TARGETS],
            [*CASES],
        )
    ):
        parser.error("kernels have changed since the rest was written: write all of it")
    if not arguments.write and not fresh:
        print(f"{EVIDENCE.name} is of other sources: run this with --write")
        return True
    rows = compile_all(arguments.jobs, arguments.targets, arguments.cases)
    bad, compiled = faults(rows), len(rows)

    def asked(r: dict[str, Any]) -> bool:
        return r["target"] in arguments.targets and r["case"] in arguments.cases

    written = evidence["rows"]
    if arguments.write:
        rows += [r for r in written if not asked(r) and r["case"] in CASES]
        places = {name: place for place, name in enumerate([*TARGETS, *CASES])}
        rows.sort(key=lambda r: (places[r["target"]], places[r["case"]]))
        evidence = {"sources": digest, "triton": triton.__version__, "rows": rows}
        EVIDENCE.write_text(json.dumps(evidence, indent=1) + "\n")
        head, _, _ = TABLE.read_text().partition(MARK)
        TABLE.write_text(head + MARK + "\n" + table(rows))
    else:
        expected = [identity(r) for r in written if asked(r)]
        if expected != [identity(r) for r in rows]:
            bad.append(f"{EVIDENCE.name} is of other kernels: run this with --write")
    print("\n".join(bad) or f"{compiled} kernels compiled, nothing wrong")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
