"""Training in two processes learns what one process does, and fails as a whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_in_processes import CONFIG, make_trainer

from deeprec.rl import RLConfig
from deeprec.rl.distributed import deal

SCRIPT = Path(__file__).parent / "train_in_processes.py"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# On CPUs it wants mpirun for several processes; with --multi_gpu it starts them as torchrun does.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
TIMED = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def weights(_warm_weights: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "warm.pt"
    torch.save(_warm_weights, path)
    return path


@pytest.fixture
def launch(weights: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    def run(
        launcher: list[str], changes: dict, sessions: tuple = (4,), failure: str = ""
    ) -> subprocess.CompletedProcess:
        task = {"weights": str(weights), "out": str(tmp_path), "changes": changes,
                "sessions": sessions, "failure": failure}  # fmt: skip
        (tmp_path / "task.json").write_text(json.dumps(task))
        return subprocess.run(
            [sys.executable, "-m", *launcher, str(SCRIPT), str(tmp_path / "task.json")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


def alone(weights: Path, config: RLConfig) -> tuple[list[dict], dict]:
    """History and final weights of one process."""
    trainer = make_trainer(weights, config)
    history = trainer.train(trainer.requests)  # type: ignore[attr-defined]
    return history, dict(trainer.policy.named_parameters())


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        (ACCELERATE, {}),
        (TORCHRUN, {"fsdp": True, "gradient_checkpointing": True}),
        (TORCHRUN, {"fsdp": True, "epochs": 2, "credit": "list_item", "train_batch": None}),
    ],
    ids=["ddp", "fsdp", "fsdp-epochs"],
)
def test_two_processes_learn_what_one_does(
    launch: Callable, weights: Path, tmp_path: Path, launcher: list[str], changes: dict
) -> None:
    # Interrupted and resumed on the way: checkpoints are part of what must agree.
    done = launch(launcher, {**changes, "out": str(tmp_path)}, sessions=(2, 4))
    assert done.returncode == 0, done.stdout + done.stderr
    history = json.loads((tmp_path / "history.json").read_text())
    final = torch.load(tmp_path / "final.pt")
    expected, parameters = alone(weights, replace(CONFIG, **{**changes, "fsdp": False}))
    assert len(history) == len(expected) == 4
    for line, wanted in zip(history, expected, strict=True):
        assert line.keys() == wanted.keys()
        for name, value in wanted.items():
            if not name.startswith(TIMED):
                assert line[name] == pytest.approx(value, abs=1e-5, rel=1e-4), name
        assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    for name, value in parameters.items():
        torch.testing.assert_close(final[name], value, atol=1e-5, rtol=1e-3)
    # One process writes and speaks.
    assert done.stdout.count("reward") == 4
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    # One process may go on with what two have saved.
    more = make_trainer(weights, replace(CONFIG, **{**changes, "fsdp": False}, out=str(tmp_path)))
    assert more.train(more.requests, resume=True) == []  # type: ignore[attr-defined]
    for name, value in more.policy.named_parameters():
        assert torch.equal(value, final[name]), name


@pytest.mark.parametrize(
    ("failure", "fsdp", "message"),
    [
        ("raise", True, "process 1: EngineError('the engine is out of order')"),
        ("die", False, "another process of the training is gone"),
    ],
)
def test_a_process_that_fails_ends_the_training_and_leaves_a_checkpoint(
    launch: Callable, tmp_path: Path, failure: str, fsdp: bool, message: str
) -> None:
    changes = {"fsdp": fsdp, "out": str(tmp_path), "checkpoint_every": 100}
    done = launch(TORCHRUN, changes, failure=failure)
    assert done.returncode != 0
    assert message in done.stderr
    assert "rl: step 3 failed; resume goes on from" in done.stderr
    saved = [path.name for path in (tmp_path / "checkpoints" / "rl").iterdir()]
    assert saved == ["step-00000002"]


def test_the_example_runs_as_written(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "train_in_processes.py"
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, str(example), "--out", str(tmp_path), "--fsdp"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_scaling_counts_the_published_parameters() -> None:
    script = Path(__file__).parents[2] / "examples" / "scaling.py"
    done = subprocess.run(
        [sys.executable, str(script), "--gpus=8"], capture_output=True, text=True, check=True
    )
    assert "7.62 B parameters on 8 GPUs" in done.stdout  # Qwen2.5's report: 7.61 B


def test_sharding_needs_processes_and_an_engine_of_its_own(weights: Path) -> None:
    with pytest.raises(ValueError, match="fsdp: there is one process"):
        make_trainer(weights, replace(CONFIG, fsdp=True))


def test_one_process_where_several_were_asked_for_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("from deeprec.rl.distributed import make_accelerator\nmake_accelerator()\n")
    one = [option for option in ACCELERATE if option != "--multi_gpu"]
    done = subprocess.run(
        [sys.executable, "-m", *one, "--cpu", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "asked for several processes, it has started one; add --multi_gpu" in done.stderr


def test_work_is_dealt_evenly() -> None:
    assert deal([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    assert deal([3], 3) == [[0], [], []]
    assert sorted(index for hand in deal(list(range(10)), 3) for index in hand) == list(range(10))
