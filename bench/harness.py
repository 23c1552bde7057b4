"""Interleaved timing of peers, and how a row of the table is made."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deeprec import _C, __version__

__all__ = ["Table", "markdown"]

# Each callable of a row runs at least this often and this long, unless the limit comes first.
MIN_ROUNDS, MIN_SECONDS, MAX_SECONDS = 5, 0.3, 6.0
PEAK_SECONDS = 0.3
SHORT_CALL = 0.1


def timings(
    calls: Mapping[str, Callable[[], Any]],
    short: bool,
    limit: float = MAX_SECONDS,
    once: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every round of every callable, run in turn after one unmeasured round.

    A short call is made twice and the second one counts: the first finds the caches full of
    whatever ran before it, and threads of that library still waiting for more work. ``once`` is
    for calls of seconds, beside which the start of threads is nothing: their first call counts.
    """
    if once:
        return {name: [timed(call)] for name, call in calls.items()}
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while True:
        for name, call in calls.items():
            for _ in range(2):
                took = timed(call)
                if took > SHORT_CALL:
                    break
            seconds[name].append(took)
        rounds, elapsed = len(next(iter(seconds.values()))), time.perf_counter() - start
        enough = rounds >= MIN_ROUNDS and elapsed >= MIN_SECONDS * len(calls)
        if short or enough or elapsed > limit * len(calls):
            return seconds


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def forget_peak() -> None:
    """Let :func:`peak_megabytes` start at the present size, whatever imports took (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_megabytes() -> float:
    """The largest resident set of this program so far.

    Not ``ru_maxrss``: that starts at the size of the process that launched this one, and hides
    whatever grows below it.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


class Table:
    """The rows measured in this run of pytest, and the machine's peaks measured beside them."""

    def __init__(self, *, short: bool, threads: int, seconds: float = MAX_SECONDS) -> None:
        self.short, self.threads, self.seconds = short, threads, seconds
        self.results: list[dict[str, Any]] = []
        torch.set_num_threads(threads)

    @cached_property
    def peaks(self) -> dict[str, float]:
        """Operations (bytes) a second, by unit: what small kernels reach on this machine."""
        seconds = 0.02 if self.short else PEAK_SECONDS
        names = ("fp32_fma", "fp64_fma", "int8_dot", "bf16_dot", "exp_sum", "read_bandwidth")
        peaks = {n: float(getattr(_C, f"peak_{n}")(seconds, self.threads)) for n in names}
        if "avx512_vnni" in _C.available_isas() and _C.isa() == "amx":
            # The vector unit's own peaks: what sets without a matrix unit can reach.
            _C.set_isa("avx512_vnni")
            try:
                for name in ("int8_dot", "bf16_dot"):
                    rate = getattr(_C, f"peak_{name}")(seconds, self.threads)
                    peaks[f"{name}_vector"] = float(rate)
            finally:
                _C.set_isa("amx")
        return peaks

    def row(
        self,
        op: str,
        what: Mapping[str, Any],
        *,
        ours: Mapping[str, Callable[[], Any]],
        peers: Mapping[str, Callable[[], Any]],
        operations: float = 0,
        unit: str = "",
        bytes_read: float = 0,
        notes: Mapping[str, Any] | None = None,
        once: bool = False,
    ) -> dict[str, Any]:
        """Time ours and peers in turn and add a row; ``once`` as for :func:`timings`.

        ``operations`` counts a multiply-add as two; with ``unit`` (a key of :attr:`peaks`) they
        give % of peak, ``bytes_read`` gives % of bandwidth. ``notes`` become columns as they are.
        A peer whose name ends in "(inexact)" is shown, but is not the one to beat.
        """
        seconds = timings({**ours, **peers}, self.short, self.seconds, once)
        exact = [name for name in peers if not name.endswith("(inexact)")]
        first = median(seconds[next(iter(ours))])
        result: dict[str, Any] = {
            "op": op,
            "what": dict(what),
            "median_ms": {name: 1e3 * median(s) for name, s in seconds.items()},
            "best_ms": {name: 1e3 * min(s) for name, s in seconds.items()},
            "ours": list(ours),
            "notes": dict(notes or {}),
        }
        if exact:
            fastest = min(exact, key=lambda name: median(seconds[name]))
            result["fastest_peer"] = fastest
            result["ratio"] = median(seconds[fastest]) / first
        if operations and self.peaks.get(unit):
            result["percent_of_peak"] = 100 * operations / first / self.peaks[unit]
            result["unit"] = unit
        if bytes_read:
            result["percent_of_bandwidth"] = 100 * bytes_read / first / self.peaks["read_bandwidth"]
        self.results.append(result)
        return result

    def facts(self, op: str, what: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        """Add a row of things that are not timings."""
        self.results.append(
            {
                "op": op,
                "what": dict(what),
                "median_ms": {},
                "best_ms": {},
                "ours": [""],
                "notes": dict(columns),
            }
        )

    def machine(self) -> str:
        peaks = ", ".join(
            f"{name} {rate / 1e9:,.0f} {'GB/s' if 'bandwidth' in name else 'Gop/s'}"
            for name, rate in self.peaks.items()
        )
        return (
            f"{_cpu_name()}, {self.threads} threads, kernels {_C.isa()}, torch "
            f"{torch.__version__}, deeprec {__version__}; measured peaks: {peaks}"
        )

    def as_json(self, op: str) -> dict[str, Any]:
        return {
            "machine": self.machine(),
            "peaks": self.peaks,
            "rows": [result for result in self.results if result["op"] == op],
        }


def markdown(table: Table, op: str | None = None) -> str:
    """One table per op, medians in milliseconds; ``ratio`` is the fastest exact peer over ours."""
    lines = [f"Machine: {table.machine()}."]
    if table.short:
        lines.append("Short mode: these timings mean nothing.")
    for name in dict.fromkeys(result["op"] for result in table.results):
        if op is None or op == name:
            rows = [result for result in table.results if result["op"] == name]
            lines += ["", f"### {name}", "", *_op_lines(rows)]
    return "\n".join(lines) + "\n"


def _op_lines(rows: list[dict[str, Any]]) -> list[str]:
    def union(key: str) -> list[str]:
        return list(dict.fromkeys(name for row in rows for name in row[key]))

    what, timed, notes = union("what"), union("median_ms"), union("notes")
    extra = [
        (key, title)
        for key, title in (
            ("ratio", "ratio"),
            ("percent_of_peak", "% peak"),
            ("percent_of_bandwidth", "% bandwidth"),
        )
        if any(key in row for row in rows)
    ]
    header = what + [f"{name} ms" for name in timed] + [title for _, title in extra] + notes
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [str(row["what"].get(name, "")) for name in what]
        for name in timed:
            value = row["median_ms"].get(name)
            cell = "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
            cells.append(f"**{cell}**" if name == row["ours"][0] else cell)
        for key, _ in extra:
            value = row.get(key)
            cells.append(
                "" if value is None else f"{value:.2f}" if key == "ratio" else f"{value:.0f}"
            )
        cells += [str(row["notes"].get(name, "")) for name in notes]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
