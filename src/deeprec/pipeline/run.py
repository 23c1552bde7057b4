"""A whole run in one folder: data to evaluated policy, resumable at any point."""

from __future__ import annotations

import time

import torch
import yaml

from deeprec import backends
from deeprec.eval.results import replace_text
from deeprec.pipeline.config import RunConfig, plain
from deeprec.pipeline.console import console, heading, print_ops, print_results
from deeprec.pipeline.evaluation import evaluate_run
from deeprec.pipeline.folder import RunFolder
from deeprec.pipeline.parts import Parts
from deeprec.pipeline.processes import Processes
from deeprec.pipeline.report import write_report
from deeprec.pipeline.stages import (
    INITIAL,
    initial_policy,
    pretrain_policy,
    reinforce,
    stage_requests,
    train_recommenders,
)
from deeprec.pipeline.summary import facts, notes

__all__ = ["Run", "RunFolderError"]


class RunFolderError(RuntimeError):
    """The run folder is taken, or does not belong to this configuration."""


class Run:
    """One run. Stages that are done are not done again.

    Under ``torchrun`` or ``accelerate launch`` every process makes one and calls the same methods:
    reinforcement learning is done by all of them, everything else by the first, which alone prints
    and writes.

    Args:
        config: what to run.
        resume: go on in a folder that exists.

    Raises RunFolderError when the folder exists and ``resume`` is off, or was made with another
    configuration.
    """

    def __init__(self, config: RunConfig, *, resume: bool = False) -> None:
        self.config = config
        self.folder = RunFolder.of(config)
        self.processes = Processes()
        console.quiet = not self.processes.is_first
        self.processes.first(lambda: self._open(resume))
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.parts = Parts(config, self.folder)
        self._started = time.perf_counter()
        backends.reset_op_table()

    def _open(self, resume: bool) -> None:
        text = yaml.safe_dump(plain(self.config), sort_keys=False)
        root = self.folder.root
        if self.folder.config.exists():
            if not resume:
                raise RunFolderError(
                    f"{root} holds a run already: pass --resume to go on with it, --out or --name "
                    "for another folder, or delete it"
                )
            kept = yaml.safe_load(self.folder.config.read_text(encoding="utf-8"))
            wanted = yaml.safe_load(text)
            changed = sorted(k for k in {*kept, *wanted} if kept.get(k) != wanted.get(k))
            if set(changed) - {"out", "threads"}:
                raise RunFolderError(
                    f"{root} was made with other settings of: {', '.join(changed)}. Pass "
                    f"--config {self.folder.config} to go on with those, or another --out"
                )
        else:
            root.mkdir(parents=True, exist_ok=True)
            replace_text(self.folder.config, text)

    def recommenders(self) -> None:
        """Everything up to the trained recommenders."""
        self.processes.first(self._recommenders)

    def _recommenders(self) -> None:
        heading("Data")
        console.print(str(self.parts.dataset.report))
        if self.parts.from_scratch:
            heading("Pre-training the policy on dated histories")
            pretrain_policy(self.parts)
        heading("Training the recommenders")
        train_recommenders(self.parts)

    def policy(self) -> None:
        """Everything up to the policy after the last stage."""
        self.recommenders()
        heading("Warm start" if self.parts.from_scratch else "Loading the policy")
        self.processes.first(lambda: initial_policy(self.parts))
        before = INITIAL
        for stage, requests in zip(self.config.stages, stage_requests(self.parts), strict=True):
            heading(f"{stage.name}: {stage.steps} steps on {len(requests):,} users")
            reinforce(self.parts, stage, before, requests, self.processes)
            before = stage.name
        self.processes.first(lambda: self.folder.publish_policy(before))

    def evaluate(self) -> None:
        """Evaluate what was trained, and write table and report."""
        if not self.processes.is_first:
            return
        heading("Evaluating the baselines")
        results = evaluate_run(self.parts)
        print_results(results)
        seconds = time.perf_counter() - self._started
        ops = backends.op_table()
        print_ops(ops, seconds)
        path = write_report(
            self.folder.root,
            facts=facts(self.parts),
            notes=notes(results, [stage.name for stage in self.config.stages]),
            ops=ops,
            seconds=seconds,
        )
        heading(f"Done: {path}")

    def everything(self) -> None:
        """The whole run."""
        self.policy()
        self.evaluate()
