"""Metrics of a training: ``metrics.jsonl``, TensorBoard and one line a step on the console."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["MetricsLog", "console_line", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, float | int | str]]:
    """The whole lines of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


class MetricsLog:
    """Writes a training's steps next to those of other trainings in the same folder.

    ``folder/metrics.jsonl`` gets one line a step with ``stage`` = ``name`` and ``step`` (from 1);
    ``folder/tensorboard/name`` the events. Opening the log drops this stage's lines from
    ``first_step`` on: a resumed training writes them again. ``folder`` None: console only.
    """

    def __init__(self, folder: Path | None, name: str, *, first_step: int = 1) -> None:
        self.name = name
        self._path: Path | None = None
        self._events: SummaryWriter | None = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._drop_from(first_step)
        self._events = SummaryWriter(str(folder / "tensorboard" / name), purge_step=first_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step everywhere."""
        print(console_line(self.name, step, metrics), flush=True)
        if self._path is None or self._events is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": self.name, "step": step, **metrics}) + "\n")
        for key, value in metrics.items():
            self._events.add_scalar(key, value, step)
        self._events.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self._events is not None:
            self._events.close()

    def _drop_from(self, first_step: int) -> None:
        assert self._path is not None
        kept = [
            line
            for line in read_metrics(self._path)
            if line["stage"] != self.name or int(line["step"]) < first_step
        ]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self._path)


def console_line(name: str, step: int, metrics: Mapping[str, float]) -> str:
    """What a person wants to see of a step."""
    parts = [
        f"{name} {step:4d}",
        f"reward {metrics['reward/total']:+.3f}",
        f"valid {metrics['valid_rate']:.1%}",
        f"calls {metrics['tool_calls']:.2f}",
        f"tokens {metrics['response_tokens']:.0f}",
    ]
    if "entropy" in metrics:
        parts += [
            f"entropy {metrics['entropy']:.3f}",
            f"kl {metrics['kl']:.4f}",
            f"clip {metrics['clip_fraction']:.1%}",
            f"grad {metrics['grad_norm']:.2f}",
            f"engine diff {metrics['logprob_difference']:.1e}",
        ]
    if metrics["dropped"]:
        parts.append(f"dropped {metrics['dropped']:.0f} too long")
    parts.append(
        f"{metrics['tokens_per_second/rollout']:.0f} + {metrics['tokens_per_second/train']:.0f} "
        f"tok/s, {metrics['seconds/rollout']:.1f} + {metrics['seconds/train']:.1f} s"
    )
    return "  ".join(parts)
