"""Configurations: files, defaults and command line agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from deeprec.pipeline.config import RunConfig, plain

CONFIGS = Path(__file__).parents[2] / "configs"


def load(path: Path) -> RunConfig:
    """A file as ``deeprec run --config`` reads it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig, fail_untyped=True)
    values = vars(parser.instantiate(parser.parse_args([f"--config={path}"])))
    values.pop("config")
    return RunConfig(**values)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_is_a_configuration_named_after_it(path: Path) -> None:
    config = load(path)
    assert config.name == path.stem
    assert config.stages and all(stage.steps > 0 for stage in config.stages)


def test_the_default_file_says_what_the_defaults_are() -> None:
    assert load(CONFIGS / "default.yaml") == RunConfig()


def test_the_paper_file_has_the_paper_constants() -> None:
    paper = load(CONFIGS / "paper.yaml")
    assert (paper.environment.k, paper.environment.max_calls) == (20, 8)
    assert paper.rewards.preset == "paper"
    assert paper.rl.loss.kl_coef == 0 and not paper.environment.options.closing
    assert paper.max_rank == 100 and paper.rl.train_batch == 512
    assert (paper.sampling.temperature, paper.sampling.top_p) == (1.0, 0.95)
    stages = [(s.reward, s.steps, s.prompts_per_step, s.samples_per_prompt) for s in paper.stages]
    assert stages == [("cold", 20, 128, 8), ("rec", 80, 128, 8)]
    assert {stage.lr for stage in paper.stages} == {1e-6}


def test_what_is_written_into_a_run_folder_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain(load(CONFIGS / "smoke.yaml"))))
    assert load(path) == load(CONFIGS / "smoke.yaml")
