"""The fused TRM on the emulated CUDA kernels, against the eager module."""

from __future__ import annotations

import gpu_trm
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_trm import ask, make
from test_packed import DATA


@settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    hidden=st.sampled_from([8, 24, 33]),
    heads=st.sampled_from([1, 2]),
    layers=st.integers(1, 3),
    length=st.integers(1, 12),
    experts=st.sampled_from([1, 5]),
    padding_row=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_gives_the_eager_vectors(
    emulated,
    hidden: int,
    heads: int,
    layers: int,
    length: int,
    experts: int,
    padding_row,
    seed: int,
) -> None:
    options = {"padding_row": padding_row, "n_experts": experts}
    gpu_trm.check_any_shape("cuda", hidden, heads, layers, length, seed, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 128, "hidden": 16, "inner": 20},
        {"hidden": 160, "inner": 130, "text_dim": 200, "n_experts": 16},
    ],
    ids=["long", "wide"],
)
def test_the_ends_of_the_supported_range(emulated, options: dict[str, int]) -> None:
    gpu_trm.check(make(1, **options), "cuda", rows=3)


def test_every_schedule_gives_the_same(every_schedule) -> None:
    gpu_trm.check(make(2, n_layers=1, n_experts=2), "cuda", rows=3)


@pytest.mark.parametrize("name", DATA)
def test_reference_checkpoints(emulated, name: str) -> None:
    gpu_trm.check_reference_checkpoint("cuda", name)


def test_retrieval_merges_history_and_exclusions(emulated) -> None:
    gpu_trm.check_retrieval_merges_history_and_exclusions("cuda")


def test_no_preference_is_the_norm_of_the_states(emulated) -> None:
    gpu_trm.check_no_preference_is_the_norm_of_the_states("cuda")


def test_nobody_and_nonsense(emulated) -> None:
    gpu_trm.check_nobody_and_nonsense("cuda")


def test_refusals_are_explained(emulated) -> None:
    gpu_trm.check_limits_are_explained("cuda")
    model = make(5)
    history, lengths, _ = ask(model, 2)
    with pytest.raises(RuntimeError, match="weights are"):
        model.pack(torch.bfloat16).user_vectors(history, lengths, backend="cuda")
