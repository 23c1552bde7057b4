"""The command line: ``deeprec run`` does everything, the other commands do its parts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, set_parsing_settings

from deeprec import __version__

__all__ = ["main"]

PARTS = {
    "run": "raw interactions to an evaluated policy: everything below in one run folder",
    "data": "load the data set and report what was kept and dropped",
    "trm": "train the recommenders",
    "rl": "train the recommenders and the policy",
    "eval": "evaluate the run in a folder again",
}


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The whole command line, and the parser of each command."""
    from deeprec.pipeline.config import RunConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help of each option
    parser = ArgumentParser(
        prog="deeprec",
        description="A language model and a recommender explore an item catalogue together, "
        "trained by reinforcement learning (DeepRec, arXiv 2505.16810).",
        version=f"deeprec {__version__}",
    )
    commands = parser.add_subcommands(required=True)
    by_name = {}
    for name, purpose in PARTS.items():
        command = by_name[name] = ArgumentParser(description=f"deeprec {name}: {purpose}.")
        command.add_argument(
            "--config", action="config", help="YAML file with any of the options below"
        )
        command.add_argument(
            "--resume",
            action="store_true",
            help="go on with the run in the folder instead of refusing to touch it",
        )
        command.add_class_arguments(RunConfig, fail_untyped=True)
        commands.add_subcommand(name, command, help=purpose)
    commands.add_subcommand(
        "info",
        ArgumentParser(description="deeprec info: versions, instruction set and backends."),
        help="show versions, instruction set and backends of every op",
    )
    bench = ArgumentParser(
        description="deeprec bench: check the GPU kernels against the reference, then time them "
        "beside torch and whichever peers are installed."
    )
    bench.add_argument("--device", type=str, default="cuda", help="the GPU, such as cuda:0")
    bench.add_argument("--check_only", action="store_true", help="time nothing")
    commands.add_subcommand("bench", bench, help="check and time the kernels on a GPU")
    compare = ArgumentParser(
        description="deeprec compare: NDCG@10 of finished runs side by side, as Markdown."
    )
    compare.add_argument("folders", nargs="+", type=Path, help="run folders")
    commands.add_subcommand("compare", compare, help="finished runs side by side")
    return parser, by_name


def _compare(folders: Sequence[Path]) -> int:
    from deeprec.pipeline.compare import comparison_tables

    try:
        print(comparison_tables(folders))
    except FileNotFoundError as error:
        print(f"deeprec compare: {error}", file=sys.stderr)
        return 1
    return 0


def _info() -> None:
    import torch
    import transformers

    from deeprec import _C, backends

    print(
        f"deeprec {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"instruction set {backends.isa()} of {', '.join(_C.available_isas())}")
    print(f"threads {torch.get_num_threads()}, CUDA devices {torch.cuda.device_count()}")
    for op, names in backends.available().items():
        print(f"{op}: {', '.join(names)}")


def _bench(device: str, check_only: bool) -> int:
    from deeprec import gpu_bench

    try:
        wrong = gpu_bench.run(device, check_only=check_only).wrong
    except gpu_bench.NoDevice as error:
        print(f"deeprec bench: {error}", file=sys.stderr)
        return 1
    for line in wrong:
        print(f"deeprec bench: {line}", file=sys.stderr)
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors of the user are printed without a traceback."""
    parser, by_name = _parsers()
    parsed = parser.parse_args(arguments)
    command = parsed.subcommand
    if command == "info":
        _info()
        return 0
    if command == "bench":
        return _bench(parsed.bench.device, parsed.bench.check_only)
    if command == "compare":
        return _compare(parsed.compare.folders)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from transformers.utils import logging as transformers_logging

    from deeprec.data import DataError, load_dataset
    from deeprec.pipeline.config import RunConfig
    from deeprec.pipeline.folder import RunFolder
    from deeprec.pipeline.run import Run, RunFolderError
    from deeprec.rl import (
        CheckpointError,
        ProcessFailedError,
        TrainingDiverged,
        TrainingInterrupted,
    )
    from deeprec.rollout import EngineError

    transformers_logging.disable_progress_bar()
    options = parsed[command].clone()
    resume = options.pop("resume")
    options.pop("config")
    try:
        values = vars(by_name[command].instantiate(options))
        config = RunConfig(**{key: value for key, value in values.items() if key != "config"})
    except ValueError as error:  # of an option that has the right type
        by_name[command].error(str(error))
    try:
        if command == "data":
            print(load_dataset(config.data).report)
            return 0
        run = Run(config, resume=resume or command == "eval")
        {"run": run.everything, "trm": run.recommenders, "rl": run.policy, "eval": run.evaluate}[
            command
        ]()
    except (TrainingInterrupted, KeyboardInterrupt) as stop:
        kept = RunFolder.of(config).config
        again = f" Go on with: deeprec {command} --config {kept} --resume" if kept.exists() else ""
        print(f"\nInterrupted. {stop}{again}", file=sys.stderr)
        return 130
    except (
        DataError, RunFolderError, CheckpointError, EngineError, ProcessFailedError,
        TrainingDiverged, ImportError, OSError,
    ) as error:  # fmt: skip
        print(f"deeprec {command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
