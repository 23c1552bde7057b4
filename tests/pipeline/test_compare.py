from __future__ import annotations

import json
from pathlib import Path

import pytest

from deeprec.cli import main
from deeprec.pipeline.compare import comparison_tables


@pytest.fixture
def run(tmp_path: Path):
    def write(name: str, seed: int, trm: float, **extra: float) -> Path:
        def value(mean: float) -> dict:
            return {"ndcg@10": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}

        difference = {"difference": 0.02, "low": -0.01, "high": 0.05, "p": 0.1, "users": 9}
        results = {
            "systems": {"trm": value(trm), **{name: value(mean) for name, mean in extra.items()}},
            "paired": {"policy_stage2_vs_trm": {"ndcg@10": difference}},
            "all_users": {"systems": {"trm": value(trm / 2)}, "paired": {}},
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(results))
        (folder / "config.yaml").write_text(f"name: {name}\nseed: {seed}\n")
        return folder

    return write


def test_runs_side_by_side(run) -> None:
    text = comparison_tables([run("a", 0, 0.1), run("b", 1, 0.2, lm=0.3)])
    lines = text.splitlines()
    assert lines[0] == "| system | seed 0 | seed 1 | mean ± s.d. |"
    assert "| trm | 0.1000 | 0.2000 | 0.1500 ± 0.0707 |" in lines
    assert "| trm, all users | 0.0500 | 0.1000 | 0.0750 ± 0.0354 |" in lines
    assert "| lm | – | 0.3000 | 0.3000 |" in lines
    cell = "+0.0200 [-0.0100, +0.0500]"
    assert f"| policy_stage2 − trm | {cell} | {cell} |" in lines


def test_one_seed_twice_goes_by_the_folders(run) -> None:
    text = comparison_tables([run("a", 0, 0.1), run("b", 0, 0.2)])
    assert text.startswith("| system | a | b | mean ± s.d. |")


def test_an_unfinished_run(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert main(["compare", str(run("a", 0, 0.1)), str(tmp_path)]) == 1
    assert "no finished run in" in capsys.readouterr().err
