"""Checkpoints are whole or not there."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deeprec.rl import checkpoint
from deeprec.rl.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def trained(tiny_policy: Callable, seed: int = 0) -> tuple:
    policy = tiny_policy(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    ids = torch.arange(12).reshape(2, 6)
    policy(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return policy, optimizer


def test_round_trip(tiny_policy: Callable, tmp_path: Path) -> None:
    policy, optimizer = trained(tiny_policy)
    path = save_checkpoint(tmp_path, policy, optimizer, {"step": 3, "seed": 0})
    other, other_optimizer = trained(tiny_policy, seed=1)
    assert load_checkpoint(path, other, other_optimizer) == {"step": 3, "seed": 0}
    for mine, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    mine_state, their_state = optimizer.state_dict(), other_optimizer.state_dict()
    for key, value in mine_state["state"].items():
        assert torch.equal(value["exp_avg_sq"], their_state["state"][key]["exp_avg_sq"])


def test_the_newest_are_kept(tiny_policy: Callable, tmp_path: Path) -> None:
    policy, optimizer = trained(tiny_policy)
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, policy, optimizer, {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000100"


@pytest.mark.parametrize("failing", ["save_file", "torch.save", "_sync"])
def test_a_full_disk_leaves_the_last_one(
    tiny_policy: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    policy, optimizer = trained(tiny_policy)
    good = save_checkpoint(tmp_path, policy, optimizer, {"step": 1})

    def fail(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = torch if failing == "torch.save" else checkpoint
    monkeypatch.setattr(target, failing.removeprefix("torch."), fail)
    with pytest.raises(CheckpointError, match=r"No space left.*last good checkpoint is .*00001"):
        save_checkpoint(tmp_path, policy, optimizer, {"step": 2})
    assert list(tmp_path.iterdir()) == [good]
    load_checkpoint(good, *trained(tiny_policy))


def test_what_a_kill_left_behind_is_ignored(tiny_policy: Callable, tmp_path: Path) -> None:
    policy, optimizer = trained(tiny_policy)
    half = tmp_path / ".tmp-step-00000007"
    half.mkdir()
    (half / "policy.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    assert save_checkpoint(tmp_path, policy, optimizer, {"step": 7}).name == "step-00000007"
    assert not half.exists()


def test_another_policy_is_refused(tiny_policy: Callable, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, *trained(tiny_policy), {"step": 1})
    wide = tiny_policy(intermediate_size=48)
    with pytest.raises(CheckpointError, match="checkpoint of another policy: 6 parameters differ"):
        load_checkpoint(path, wide, torch.optim.AdamW(wide.parameters()))
