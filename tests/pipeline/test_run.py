"""Whole runs on a tiny shop: what they leave behind, and that nothing stops them for good."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deeprec.cli import main

POLICIES = ("policy_initial", "policy_stage1", "policy_stage2")
METRICS = ("recall@1", "recall@5", "recall@10", "ndcg@5", "ndcg@10", "valid_rate", "mean_turns")


@pytest.fixture(scope="module")
def finished(
    tiny_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of a whole run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_options))
    done = start(config, folder / "run")
    printed, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    return folder / "run", printed


def start(config: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """``deeprec run`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "deeprec.cli", "run", "--config", config, "--out", out, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Until something happened, or the process ended."""
    end = time.monotonic() + 240
    while not happened() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.02)


def assert_complete(folder: Path) -> None:
    """Every file of a run folder is there and whole."""
    assert (folder / "trm" / "rl").is_dir() and (folder / "trm" / "valid").is_dir()
    assert (folder / "policy" / "config.json").is_file()
    assert (folder / "policy" / "model.safetensors").is_file()
    assert list((folder / "tensorboard").rglob("events.*"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["name"] == "tiny"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    talks = [json.loads(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]
    assert {talk["system"] for talk in talks} >= set(POLICIES)
    systems = json.loads((folder / "metrics.json").read_text())["systems"]
    assert {"popularity", "trm", *POLICIES} <= set(systems)
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")


def test_a_run_leaves_everything_the_documentation_names(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert_complete(folder)
    results = json.loads((folder / "metrics.json").read_text())
    for name in ("popularity", "trm", *POLICIES):
        for metric in METRICS:
            interval = results["systems"][name][metric]
            assert interval["low"] <= interval["mean"] <= interval["high"]
    for name in ("policy_stage2_vs_trm", "policy_stage2_vs_policy_initial"):
        assert {"difference", "low", "high", "p"} <= set(results["paired"][name]["ndcg@10"])
    ablations = ("empty_preferences", "shuffled_preferences", "single_turn")
    assert {f"policy_stage2_{name}" for name in ablations} <= set(results["systems"])
    assert results["systems"]["policy_stage2_single_turn"]["mean_turns"]["high"] <= 1
    assert "policy_stage2" in results["all_users"]["systems"]
    assert "recall@10_on_rl_targets" in results["training_recommender"]


def test_it_prints_the_table_and_the_ops(finished: tuple[Path, str]) -> None:
    _, printed = finished
    for word in ("policy_stage2", "policy_stage2 - trm", "topk", "linear_logprobs", "report.html"):
        assert word in printed
    assert "share of the run" in printed


def test_a_folder_that_is_taken_is_left_alone(
    finished: tuple[Path, str], tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    before = (folder / "metrics.json").read_bytes()
    assert main(["run", f"--config={tiny_config}", f"--out={folder}"]) == 1
    assert "--resume" in capsys.readouterr().err
    assert (folder / "metrics.json").read_bytes() == before


def test_it_does_not_go_on_with_other_settings(
    finished: tuple[Path, str], tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    options = ["--resume", "--seed=7", "--trm.hidden=16"]
    assert main(["run", f"--config={tiny_config}", f"--out={folder}", *options]) == 1
    errors = capsys.readouterr().err
    assert "seed, trm" in errors and "config.yaml" in errors


def test_a_killed_run_goes_on_and_completes(tiny_config: Path, tmp_path: Path) -> None:
    """SIGKILL in the recommenders' training, in the first RL stage and in the evaluation."""
    out, dice = tmp_path / "run", random.Random(0)
    moments = [out / "trm" / "rl", out / "metrics.jsonl", out / "policy"]
    for number, moment in enumerate(moments):
        process = start(tiny_config, out, *(["--resume"] if number else []))
        wait_for(process, moment.exists)
        time.sleep(0.3 * dice.random())
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it had not ended by itself
    last = start(tiny_config, out, "--resume")
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert_complete(out)


def test_ctrl_c_says_how_to_go_on(tiny_config: Path, tmp_path: Path) -> None:
    # An interrupt that lands in a destructor, or in a library's bare except, is lost: try again.
    for attempt in range(3):
        out = tmp_path / f"run{attempt}"
        process = start(tiny_config, out)
        wait_for(process, (out / "stages" / "pretrained").exists)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        if process.returncode != 0:
            break
    assert process.returncode == 130
    assert "--resume" in errors and str(out) in errors and "Traceback" not in errors


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_make_one_run(
    tiny_config: Path, tmp_path: Path, finished: tuple[Path, str], fsdp: bool
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "deeprec.cli", "run", "--config", tiny_config, "--out", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [*command, "--rl.fsdp", str(fsdp).lower()],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "run")
    assert done.stdout.count("Training the recommenders") == 1
    alone = [json.loads(line) for line in (finished[0] / "metrics.jsonl").open()]
    together = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["stage"] for line in together] == ["stage1", "stage2"]
    for one, two in zip(alone, together, strict=True):
        assert one["grad_norm"] > 1e-3 and abs(one["loss"]) > 1e-3  # it was trained on something
        assert one.keys() == two.keys()
        for name, value in one.items():
            if name != "stage" and not name.startswith(("seconds", "tokens_per_second")):
                assert two[name] == pytest.approx(value, abs=1e-5, rel=1e-3), name
