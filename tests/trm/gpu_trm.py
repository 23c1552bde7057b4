"""What the packed TRM must do on every GPU backend, wherever its kernels are executed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_trm import ask, assert_as_exact_as_eager, make
from test_model import reference

from deeprec import backends
from deeprec.ops import SeenItems
from deeprec.trm import PreferenceAwareTRM


def check(model: PreferenceAwareTRM, backend: str, rows: int, seed: int = 0) -> None:
    """User vectors, and the same from the states of an earlier turn."""
    history, lengths, preference = ask(model, rows, seed)
    packed = model.pack()
    users = packed.user_vectors(history, lengths, preference, backend=backend)
    assert_as_exact_as_eager(model, users, history, lengths, preference)
    states = packed.history_states(history, lengths, backend=backend)
    again = packed.user_vectors(None, None, preference, states=states, backend=backend)
    assert torch.equal(again, users)


def check_any_shape(
    backend: str, hidden: int, heads: int, layers: int, length: int, seed: int, **options: Any
) -> None:
    """``hidden`` is a head's width."""
    shape = {"hidden": hidden * heads, "n_heads": heads, "n_layers": layers, "max_length": length}
    check(make(seed, **shape, **options), backend, rows=5, seed=seed)


def check_reference_checkpoint(backend: str, name: str) -> tuple[PreferenceAwareTRM, Any, Any]:
    """User vectors; gives the model, what it was asked, and the checkpoint's data."""
    config, state, data = reference(name)
    model = PreferenceAwareTRM.from_reference(config, state)
    asked = (data["item_seq"], data["item_seq_len"], data["query_text_emb"])
    users = model.pack().user_vectors(*asked, backend=backend)
    torch.testing.assert_close(users, data["user_vector"], rtol=0, atol=1e-5)
    return model, asked, data


def check_retrieval_merges_history_and_exclusions(backend: str) -> None:
    model = make(3)
    asked = ask(model, 4)
    exclude = SeenItems.from_lists([[1, 2], [], [5], [7, 9, 11]])
    got, expected = (
        model.pack().retrieve(*asked, 6, exclude=exclude, exclude_history=True, backend=name)
        for name in (backend, "reference")
    )
    assert torch.equal(got.indices, expected.indices)
    torch.testing.assert_close(got.values, expected.values, atol=1e-5, rtol=0)


def check_no_preference_is_the_norm_of_the_states(backend: str) -> None:
    model = make(6)
    history, lengths, _ = ask(model, 3)
    users = model.pack().user_vectors(history, lengths, None, backend=backend)
    expected = model.OutLayerNorm(model.history_states(history, lengths)).detach()
    torch.testing.assert_close(users, expected, atol=1e-5, rtol=0)


def check_nobody_and_nonsense(backend: str) -> None:
    """No users; lengths and ids that nothing checks on a GPU stay inside the tables."""
    model = make(4)
    history, lengths, preference = ask(model, 3)
    packed = model.pack()
    assert packed.user_vectors(history[:0], lengths[:0], backend=backend).shape == (0, 24)
    history[0, 0], history[1, 0], lengths[2] = 10**9, -5, 10**6
    assert packed.user_vectors(history, lengths, preference, backend=backend).isfinite().all()


def check_opcheck(backend: str) -> None:
    """All three ops, from histories and from states, with and without a preference."""
    packed = make(n_layers=1, hidden=8, inner=8, max_length=4).pack()
    history, lengths, preference = ask(packed.module(), 4)
    states = packed.history_states(history, lengths)
    seen = SeenItems.from_lists([[1], [], [2, 3], []])
    ops = torch.ops.deeprec
    torch.library.opcheck(ops.trm_history.default, (packed.name, history, lengths, backend))
    for asked in ((history, lengths, None, preference), (None, None, states, None)):
        torch.library.opcheck(ops.trm_user_vectors.default, (packed.name, *asked, backend))
    for asked in ((history, lengths, None, preference), (history, lengths, states, None)):
        arguments = (packed.name, *asked, seen.offsets, seen.ids, True, 3, backend)
        torch.library.opcheck(ops.trm_retrieve.default, arguments)


def check_limits_are_explained(backend: str) -> None:
    with pytest.raises(RuntimeError, match="max_length is 129, more than 128"):
        model = make(5, max_length=129)
        model.pack().user_vectors(*ask(model, 2), backend=backend)
    model = make(5)
    history, _, _ = ask(model, 2)
    assert f"trm_user_vectors[{backend}]: runs" in backends.explain(
        "trm_user_vectors", model.pack(), history
    )
