"""Several runs side by side: the same systems and comparisons, one column a run and their mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

__all__ = ["comparison_tables"]

METRIC = "ndcg@10"


def comparison_tables(folders: Sequence[Path]) -> str:
    """Two Markdown tables of the runs in ``folders``: NDCG@10 of each system, paired differences.

    Rows of a smaller sample and of all users are kept apart. A run's column is its seed where
    that tells them apart, else its folder's name.

    Raises FileNotFoundError for a folder without a finished run.
    """
    runs = [_finished(folder) for folder in folders]
    seeds = [f"seed {seed}" for _, seed in runs]
    names = seeds if len(set(seeds)) == len(seeds) else [folder.name for folder in folders]
    systems: dict[str, dict[int, str]] = {}
    means: dict[str, list[float]] = {}
    paired: dict[str, dict[int, str]] = {}
    for column, (results, _) in enumerate(runs):
        for part, suffix in ((results, ""), (results.get("all_users", {}), ", all users")):
            for system, metrics in part.get("systems", {}).items():
                value = metrics[METRIC]["mean"]
                systems.setdefault(system + suffix, {})[column] = f"{value:.4f}"
                means.setdefault(system + suffix, []).append(value)
            for comparison, metrics in part.get("paired", {}).items():
                m = metrics[METRIC]
                row = comparison.replace("_vs_", " − ") + suffix
                paired.setdefault(row, {})[column] = (
                    f"{m['difference']:+.4f} [{m['low']:+.4f}, {m['high']:+.4f}]"
                )
    columns = range(len(runs))
    averaged = {name: {**row, len(runs): _spread(means[name])} for name, row in systems.items()}
    return "\n".join(
        [
            *_table("system", [*names, "mean ± s.d."], averaged, range(len(runs) + 1)),
            "",
            *_table("comparison", names, paired, columns),
        ]
    )


def _finished(folder: Path) -> tuple[Mapping[str, Any], int]:
    """The results of a run, and its seed."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no finished run in {folder}: {path.name} is written at the end of deeprec run"
        )
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return json.loads(path.read_text(encoding="utf-8")), int(config["seed"])


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def _table(
    head: str, names: Sequence[str], rows: Mapping[str, Mapping[int, str]], columns: Sequence[int]
) -> list[str]:
    lines = [f"| {head} | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for name, cells in rows.items():
        lines.append(f"| {name} | {' | '.join(cells.get(c, '–') for c in columns)} |")
    return lines
