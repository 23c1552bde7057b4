"""Checkpoints that are either whole or not there.

A checkpoint is a folder ``step-00000020`` with the trained parameters (``policy.safetensors``; the
adapters alone under LoRA), ``optimizer.pt`` and ``state.json``. It is written under a temporary
name and renamed when everything is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from deeprec.rollout.weights import assign, whole

__all__ = ["CheckpointError", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

PREFIX = "step-"
TEMPORARY = ".tmp-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not fit; earlier ones are untouched."""


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, None if there is none."""
    return max(folder.glob(f"{PREFIX}*"), default=None)


def save_checkpoint(
    folder: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    keep: int = 1,
    write: bool = True,
) -> Path | None:
    """Write the checkpoint of ``state["step"]`` and drop all but the newest ``keep``.

    ``state`` must be JSON. Of a sharded policy every process must call this, and one with
    ``write``: checkpoints are whole, and can be resumed by any number of processes. Raises
    CheckpointError, e.g. on a full disk.
    """
    weights, moments = _on_cpu(_trained(policy), write), _on_cpu(optimizer.state_dict(), write)
    if not write:
        return None
    final = folder / f"{PREFIX}{state['step']:08d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(weights, temporary / "policy.safetensors")
        torch.save(moments, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(folder)
    # torch and safetensors report a failed write as errors of their own
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = latest_checkpoint(folder)
        raise CheckpointError(
            f"cannot write {final}: {error}. The last good checkpoint is {last or 'none'}; "
            "free some space or choose another folder, then resume"
        ) from error
    for old in sorted(folder.glob(f"{PREFIX}*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint into ``policy`` and ``optimizer``, in place; its state is returned.

    Raises CheckpointError if it belongs to another model.
    """
    state = json.loads((path / "state.json").read_text())
    saved = load_file(path / "policy.safetensors")
    trained = _trained(policy)
    if saved.keys() != trained.keys() or any(
        saved[name].shape != trained[name].shape for name in saved
    ):
        odd = sorted(
            name
            for name in saved.keys() | trained.keys()
            if name not in saved or name not in trained or saved[name].shape != trained[name].shape
        )
        raise CheckpointError(
            f"{path} is a checkpoint of another policy: {len(odd)} parameters differ in name or "
            f"shape, {odd[0]} first; give the policy that was trained, or another folder"
        )
    for name, tensor in trained.items():
        assign(tensor, saved[name])
    moments = torch.load(path / "optimizer.pt", weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in moments["state"].items():
        moments["state"][index] = {
            name: _like(parameters[index], value) for name, value in values.items()
        }
    optimizer.load_state_dict(moments)
    return dict(state)


def _trained(policy: nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters by name, shared ones once: all that training changes."""
    return {
        name: parameter.detach()
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    }


def _on_cpu(value: Any, keep: bool) -> Any:
    """``value`` with every tensor in it whole; in host memory if it is to be kept, else gone."""
    if isinstance(value, Mapping):
        return {key: _on_cpu(entry, keep) for key, entry in value.items()}
    if isinstance(value, torch.Tensor):
        together = whole(value)
        return together.cpu() if keep else None
    return value


def _like(parameter: torch.Tensor, value: Any) -> Any:
    """An optimizer's ``value``, sharded like its parameter where it has one entry for each."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    like = torch.empty_like(parameter, dtype=value.dtype)
    assign(like, value)
    return like


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
