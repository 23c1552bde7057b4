"""The run folder: what lies where, and how a folder in it is written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deeprec.pipeline.config import RunConfig

__all__ = ["RunFolder"]


class RunFolder:
    """Paths of a run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.trm = root / "trm"
        self.policy = root / "policy"
        self.stages = root / "stages"
        self.trajectories = root / "trajectories.jsonl"
        self.metrics = root / "metrics.json"
        self.report = root / "report.html"

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        """The folder that a configuration names."""
        return cls(Path(config.out or Path("runs") / config.name))

    def stage(self, name: str) -> Path:
        """Folder of the policy as it was after a stage."""
        return self.stages / name

    def write_folder(self, target: Path, fill: Callable[[Path], object]) -> None:
        """Let ``fill`` write into a temporary folder, then rename it to ``target``."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            fill(temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.chmod(0o755)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def publish_policy(self, stage: str) -> None:
        """Copy the policy of a stage to ``policy/``, where the result of the run is looked for."""
        self.write_folder(
            self.policy,
            lambda folder: shutil.copytree(self.stage(stage), folder, dirs_exist_ok=True),
        )
