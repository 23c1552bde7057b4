"""What a run prints: headings with the time, the final table, the table of ops."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from deeprec.backends import OpCount

__all__ = ["console", "heading", "print_ops", "print_results"]

console = Console()
_STARTED = time.perf_counter()


def heading(text: str) -> None:
    """Announce a part of the run, with the minutes since the program started."""
    minutes, seconds = divmod(int(time.perf_counter() - _STARTED), 60)
    console.print(f"[bold]\\[{minutes:02d}:{seconds:02d}] {text}[/bold]")


def print_results(results: Mapping[str, Any]) -> None:
    """The final table and the paired comparisons."""
    shown = ("recall@1", "recall@10", "ndcg@10", "valid_rate", "mean_turns")
    # Wide enough for every column whatever the terminal: a cut-off name says nothing.
    wide = Console(width=max(console.width, 130))
    table = Table("system", "users", *shown, title="Test items, leave-one-out (95% intervals)")
    for part, suffix in ((results, ""), (results.get("all_users", {}), " (all users)")):
        for name, metrics in part.get("systems", {}).items():
            cells = [f"{metrics[m]['mean']:.4f}" for m in shown]
            cells[2] += f" [{metrics['ndcg@10']['low']:.4f}, {metrics['ndcg@10']['high']:.4f}]"
            table.add_row(name + suffix, str(part["users"][name]), *cells)
    wide.print(table)
    paired = Table("comparison, NDCG@10", "users", "difference", "95% interval", "p")
    for part in (results, results.get("all_users", {})):
        for name, metrics in part.get("paired", {}).items():
            m = metrics["ndcg@10"]
            paired.add_row(
                name.replace("_vs_", " - "),
                str(int(m["users"])),
                f"{m['difference']:+.4f}",
                f"[{m['low']:+.4f}, {m['high']:+.4f}]",
                f"{m['p']:.3f}",
            )
    wide.print(paired)


def print_ops(ops: Mapping[tuple[str, str], OpCount], seconds: float) -> None:
    """Calls of each op and backend, and their share of the run's time."""
    table = Table("op", "backend", "calls", "seconds", "share of the run", title="Ops")
    for (op, backend), count in sorted(ops.items(), key=lambda entry: -entry[1].seconds):
        table.add_row(
            op,
            backend,
            f"{count.calls:,}",
            f"{count.seconds:.1f}",
            f"{count.seconds / seconds:.1%}",
        )
    console.print(table)
