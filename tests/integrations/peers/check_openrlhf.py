"""OpenRLHF with the patch on and off, and its own test of the actor; run by test_peers.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from numerics import FLOATS, assert_no_worse, logits_and_ids, run
from torch import Tensor

# OpenRLHF imports these, which need a GPU, before anything else; its own test does the same.
for name in ("deepspeed", "flash_attn", "flash_attn.bert_padding", "flash_attn.utils"):
    sys.modules.setdefault(name, MagicMock(__spec__=importlib.util.spec_from_loader(name, None)))
sys.modules.setdefault("flash_attn.utils.distributed", MagicMock())

# Its package imports every model; the two files that are patched are enough.
_package = ModuleType("openrlhf.models")
_package.__path__ = [str(metadata.distribution("openrlhf").locate_file("openrlhf/models"))]
sys.modules["openrlhf.models"] = _package

from openrlhf.models import actor, utils

import deeprec
from deeprec.integrations import explain


@pytest.fixture(autouse=True)
def _unpatched_afterwards() -> Iterator[None]:
    yield
    deeprec.unpatch()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs(dtype: torch.dtype, temperature: float) -> None:
    logits, ids = logits_and_ids((3, 11), 507)
    logits, weights = logits.to(dtype), torch.randn(3, 11)

    def call(x: Tensor) -> Any:
        return utils.log_probs_from_logits(x * 1, ids, temperature)

    truth = run(call, logits.double(), weights=weights)
    theirs = run(call, logits, weights=weights)
    with deeprec.patch("openrlhf"):
        assert actor.log_probs_from_logits is utils.log_probs_from_logits
        ours = run(call, logits, weights=weights)
        assert "log_probs_from_logits -> deeprec.gather_logprobs: 1 calls" in explain()
    assert_no_worse(ours, theirs, truth)


def test_logits_are_scaled_in_place_as_before() -> None:
    logits, ids = logits_and_ids((2, 3), 40)
    theirs, ours = logits.clone(), logits.clone()
    utils.log_probs_from_logits(theirs, ids, 0.5)
    with deeprec.patch("openrlhf"):
        utils.log_probs_from_logits(ours, ids, 0.5)
    assert torch.equal(ours, theirs)


def test_entropy() -> None:
    logits, _ = logits_and_ids((2, 9), 300)
    weights = torch.randn(2, 9)
    eager = utils.compute_entropy.__wrapped__
    truth = run(eager, logits.double(), weights=weights)
    theirs = run(eager, logits, weights=weights)
    with deeprec.patch("openrlhf"):
        ours = run(utils.compute_entropy, logits, weights=weights)
        assert "compute_entropy -> deeprec.gather_logprobs: 1 calls" in explain()
    assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_its_own_test_of_the_actor_passes(temperature: float) -> None:
    """That test loads copies of the files: the functions of ours are put into the copy."""
    path = Path(str(metadata.distribution("openrlhf").locate_file("tests")))
    path = path / "test_actor_entropy_temperature.py"
    spec = importlib.util.spec_from_file_location("own_test", path)
    assert spec is not None and spec.loader is not None
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    copy = sys.modules["_openrlhf_actor_test.actor"]
    with deeprec.patch("openrlhf"):
        copy.log_probs_from_logits = utils.log_probs_from_logits
        copy.compute_entropy = utils.compute_entropy
        own.test_entropy_matches_temperature_scaled_policy(temperature)
        assert explain().count(": 1 calls") == 2
