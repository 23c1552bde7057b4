"""Triton's TRM in the interpreter, against the eager module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trm import ask, assert_as_exact_as_eager, assert_same_ranking, eager, make
from test_model import reference
from test_packed import DATA

from deeprec import backends
from deeprec.ops import SeenItems
from deeprec.trm import PreferenceAwareTRM


def check(model: PreferenceAwareTRM, rows: int, seed: int = 0) -> None:
    """User vectors, and the same from the states of an earlier turn."""
    history, lengths, preference = ask(model, rows, seed)
    packed = model.pack()
    users = packed.user_vectors(history, lengths, preference, backend="triton")
    assert_as_exact_as_eager(model, users, history, lengths, preference)
    states = packed.history_states(history, lengths, backend="triton")
    again = packed.user_vectors(None, None, preference, states=states, backend="triton")
    assert torch.equal(again, users)


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
    model = make(
        seed,
        padding_row=padding_row,
        hidden=hidden * heads,
        n_heads=heads,
        n_layers=layers,
        max_length=length,
        n_experts=experts,
    )
    check(model, rows=4, seed=seed)


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
    check(make(1, **options), rows=2)


@pytest.mark.parametrize("name", DATA)
def test_triton_reference_checkpoints(name: str) -> None:
    config, state, data = reference(name)
    model = PreferenceAwareTRM.from_reference(config, state)
    asked = (data["item_seq"], data["item_seq_len"], data["query_text_emb"])
    users = model.pack().user_vectors(*asked, backend="triton")
    torch.testing.assert_close(users, data["user_vector"], rtol=0, atol=1e-5)
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
    model = make(3)
    history, lengths, preference = ask(model, 4)
    exclude = SeenItems.from_lists([[1, 2], [], [5], [7, 9, 11]])
    backends.reset_op_table()
    found = {
        backend: model.pack().retrieve(
            history, lengths, preference, 6, exclude=exclude, exclude_history=True, backend=backend
        )
        for backend in ("triton", "reference")
    }
    assert torch.equal(found["triton"].indices, found["reference"].indices)
    torch.testing.assert_close(found["triton"].values, found["reference"].values, atol=1e-5, rtol=0)
    assert backends.op_table()["topk_retrieve", "triton"].calls >= 1


def test_triton_no_preference_is_the_norm_of_the_states() -> None:
    model = make(6)
    history, lengths, _ = ask(model, 3)
    users = model.pack().user_vectors(history, lengths, None, backend="triton")
    expected = model.OutLayerNorm(model.history_states(history, lengths)).detach()
    torch.testing.assert_close(users, expected, atol=1e-5, rtol=0)


def test_triton_nobody_and_nonsense() -> None:
    """No users; lengths and ids that nothing checks on a GPU stay inside the tables."""
    model = make(4)
    history, lengths, preference = ask(model, 3)
    packed = model.pack()
    assert packed.user_vectors(history[:0], lengths[:0], backend="triton").shape == (0, 24)
    history[0, 0], history[1, 0], lengths[2] = 10**9, -5, 10**6
    assert packed.user_vectors(history, lengths, preference, backend="triton").isfinite().all()


def test_triton_refusals_are_explained() -> None:
    with pytest.raises(RuntimeError, match="max_length is 129, more than 128"):
        model = make(5, max_length=129)
        model.pack().user_vectors(*ask(model, 2), backend="triton")
    model = make(5)
    history, _, _ = ask(model, 2)
    assert "trm_user_vectors[triton]: runs" in backends.explain(
        "trm_user_vectors", model.pack(), history
    )
