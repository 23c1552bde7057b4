"""The fused TRM on the emulated CUDA kernels, against the eager module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_trm import ask, assert_as_exact_as_eager, make
from test_model import reference
from test_packed import DATA

from deeprec import backends
from deeprec.ops import SeenItems
from deeprec.trm import PreferenceAwareTRM


def check(model, rows: int, seed: int = 0) -> None:
    """User vectors, and the same from the states of an earlier turn."""
    history, lengths, preference = ask(model, rows, seed)
    packed = model.pack()
    users = packed.user_vectors(history, lengths, preference, backend="cuda")
    assert_as_exact_as_eager(model, users, history, lengths, preference)
    states = packed.history_states(history, lengths, backend="cuda")
    again = packed.user_vectors(None, None, preference, states=states, backend="cuda")
    assert torch.equal(again, users)


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
    model = make(
        seed,
        padding_row=padding_row,
        hidden=hidden * heads,
        n_heads=heads,
        n_layers=layers,
        max_length=length,
        n_experts=experts,
    )
    check(model, rows=5, seed=seed)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 128, "hidden": 16, "inner": 20},
        {"hidden": 160, "inner": 130, "text_dim": 200, "n_experts": 16},
    ],
    ids=["long", "wide"],
)
def test_the_ends_of_the_supported_range(emulated, options: dict[str, int]) -> None:
    check(make(1, **options), rows=3)


def test_every_schedule_gives_the_same(every_schedule) -> None:
    check(make(2, n_layers=1, n_experts=2), rows=3)


@pytest.mark.parametrize("name", DATA)
def test_reference_checkpoints(emulated, name: str) -> None:
    config, state, data = reference(name)
    model = PreferenceAwareTRM.from_reference(config, state)
    asked = (data["item_seq"], data["item_seq_len"], data["query_text_emb"])
    users = model.pack().user_vectors(*asked, backend="cuda")
    torch.testing.assert_close(users, data["user_vector"], rtol=0, atol=1e-5)


def test_retrieval_merges_history_and_exclusions(emulated) -> None:
    model = make(3)
    history, lengths, preference = ask(model, 4)
    exclude = SeenItems.from_lists([[1, 2], [], [5], [7, 9, 11]])
    found = {
        backend: model.pack().retrieve(
            history, lengths, preference, 6, exclude=exclude, exclude_history=True, backend=backend
        )
        for backend in ("cuda", "reference")
    }
    assert torch.equal(found["cuda"].indices, found["reference"].indices)
    torch.testing.assert_close(found["cuda"].values, found["reference"].values, atol=1e-5, rtol=0)


def test_no_preference_is_the_norm_of_the_states(emulated) -> None:
    model = make(6)
    history, lengths, _ = ask(model, 3)
    users = model.pack().user_vectors(history, lengths, None, backend="cuda")
    expected = model.OutLayerNorm(model.history_states(history, lengths)).detach()
    torch.testing.assert_close(users, expected, atol=1e-5, rtol=0)


def test_nobody_and_nonsense(emulated) -> None:
    """No users; lengths and ids that nothing checks on a GPU stay inside the tables."""
    model = make(4)
    history, lengths, preference = ask(model, 3)
    packed = model.pack()
    assert packed.user_vectors(history[:0], lengths[:0], backend="cuda").shape == (0, 24)
    history[0, 0], history[1, 0], lengths[2] = 10**9, -5, 10**6
    assert packed.user_vectors(history, lengths, preference, backend="cuda").isfinite().all()


def test_refusals_are_explained(emulated) -> None:
    model = make(5)
    history, lengths, _ = ask(model, 2)
    half = model.pack(torch.bfloat16)
    with pytest.raises(RuntimeError, match="weights are"):
        half.user_vectors(history, lengths, backend="cuda")
    assert "trm_user_vectors[cuda]: runs" in backends.explain(
        "trm_user_vectors", model.pack(), history
    )
