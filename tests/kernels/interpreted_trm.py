"""Triton's TRM in the interpreter, against the eager module."""

from __future__ import annotations

import gpu_trm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trm import ask, assert_same_ranking, eager, make
from test_packed import DATA

from deeprec import backends


@settings(deadline=None, max_examples=6)
@given(
    hidden=st.sampled_from([8, 17, 33]),
    heads=st.sampled_from([1, 2]),
    layers=st.integers(1, 3),
    length=st.integers(1, 9),
    experts=st.sampled_from([1, 3, 16]),
    padding_row=st.booleans(),
    seed=st.integers(0, 99),
)
def test_triton_any_shape_gives_the_eager_vectors(
    hidden: int, heads: int, layers: int, length: int, experts: int, padding_row: bool, seed: int
) -> None:
    options = {"padding_row": padding_row, "n_experts": experts}
    gpu_trm.check_any_shape("triton", hidden, heads, layers, length, seed, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 128, "hidden": 16, "inner": 20, "n_layers": 2},
        {"hidden": 512, "inner": 130, "text_dim": 200, "n_heads": 4, "n_experts": 5},
        {"hidden": 16, "n_heads": 16, "n_experts": 16},
    ],
    ids=["long", "wide", "many heads"],
)
def test_triton_ends_of_the_supported_range(options: dict[str, int]) -> None:
    gpu_trm.check(make(1, **options), "triton", rows=2)


@pytest.mark.parametrize("name", DATA)
def test_triton_reference_checkpoints(name: str) -> None:
    model, asked, data = gpu_trm.check_reference_checkpoint("triton", name)
    found = model.retrieve(*asked, 20, backend="triton")
    assert_same_ranking(model, data["user_vector"], found, 20)


def test_triton_bf16_weights_cost_little() -> None:
    model = make(n_items=300, hidden=64, n_heads=2, inner=96, max_length=10)
    history, lengths, preference = ask(model, 8)
    exact = eager(model, history, lengths, preference)
    half = model.pack(torch.bfloat16).user_vectors(history, lengths, preference, backend="triton")
    assert float(torch.nn.functional.cosine_similarity(exact, half).min()) > 0.999
    assert not torch.allclose(exact, half, atol=1e-5)


def test_triton_a_batch_split_changes_nothing() -> None:
    model = make(7, max_length=3, hidden=16, inner=20)
    history, lengths, preference = ask(model, 19)
    packed = model.pack()
    users = packed.user_vectors(history, lengths, preference, backend="triton")
    for part in (slice(0, 1), slice(1, 19)):
        asked = (history[part], lengths[part], preference[part])
        assert torch.equal(packed.user_vectors(*asked, backend="triton"), users[part])


def test_triton_retrieval_merges_history_and_exclusions() -> None:
    backends.reset_op_table()
    gpu_trm.check_retrieval_merges_history_and_exclusions("triton")
    assert backends.op_table()["topk_retrieve", "triton"].calls >= 1


def test_triton_no_preference_is_the_norm_of_the_states() -> None:
    gpu_trm.check_no_preference_is_the_norm_of_the_states("triton")


def test_triton_nobody_and_nonsense() -> None:
    gpu_trm.check_nobody_and_nonsense("triton")


def test_triton_limits_are_explained() -> None:
    gpu_trm.check_limits_are_explained("triton")
