"""The table of a run as ``metrics.json``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deeprec.eval.bootstrap import paired, summarise
from deeprec.eval.metrics import UserMetrics

__all__ = ["build_results", "replace_text", "write_results"]


def build_results(
    systems: Mapping[str, UserMetrics], comparisons: Iterable[tuple[str, str]], *, seed: int = 0
) -> dict[str, Any]:
    """The contents of ``metrics.json``.

    ``{"systems": {NAME: {metric: {"mean", "low", "high"}}}, "paired": {"A_vs_B": {metric:
    {"difference", "low", "high", "p", "users"}}}, "users": {NAME: number of users}}``.
    ``comparisons`` are pairs (A, B) of system names.
    """
    pairs = list(comparisons)
    unknown = sorted({name for pair in pairs for name in pair} - set(systems))
    if unknown:
        raise ValueError(f"comparisons name {unknown}, systems are {sorted(systems)}")
    return {
        "systems": {name: summarise(metrics, seed=seed) for name, metrics in systems.items()},
        "paired": {f"{a}_vs_{b}": paired(systems[a], systems[b], seed=seed) for a, b in pairs},
        "users": {name: len(metrics) for name, metrics in systems.items()},
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``results`` as JSON, replacing the file at once."""
    replace_text(path, json.dumps(results, indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is always whole: the old one stays until the new one is on disk."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
