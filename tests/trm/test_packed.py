"""The fused TRM against the eager module, on every instruction set of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trm import ask, assert_as_exact_as_eager, assert_same_ranking, eager, make
from test_model import reference

from deeprec import _C, backends
from deeprec.ops import SeenItems
from deeprec.trm import HistoryStates, PreferenceAwareTRM

ISAS = _C.available_isas()
DATA = sorted(path.stem for path in (Path(__file__).parent.parent / "data").glob("trm_*.npz"))


@pytest.fixture(autouse=True)
def default_isa() -> Iterator[None]:
    yield
    _C.set_isa("auto")


shapes = st.fixed_dictionaries(
    {
        "n_items": st.integers(1, 60),
        "text_dim": st.integers(1, 70),
        "n_heads": st.sampled_from([1, 2, 3, 5]),
        "inner": st.integers(1, 90),
        "n_layers": st.integers(1, 3),
        "n_experts": st.integers(1, 5),
        "max_length": st.integers(1, 21),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    head=st.integers(1, 40),
    rows=st.integers(1, 20),
    isa=st.sampled_from(ISAS),
    padding_row=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_gives_the_eager_vectors_and_ranking(
    shape: dict, head: int, rows: int, isa: str, padding_row: bool, seed: int
) -> None:
    shape = {**shape, "hidden": shape["n_heads"] * head}
    model = make(seed, padding_row=padding_row, **shape)
    history, lengths, preference = ask(model, rows, seed)
    _C.set_isa(isa)
    packed = model.pack()
    users = packed.user_vectors(history, lengths, preference)
    assert_as_exact_as_eager(model, users, history, lengths, preference)
    k = min(5, shape["n_items"])
    found = packed.retrieve(history, lengths, preference, k)
    assert_same_ranking(model, eager(model, history, lengths, preference), found, k)
    # A later turn, a history without padding on the right, and one that must not be found.
    states = packed.history_states(history, lengths)
    assert torch.equal(packed.user_vectors(None, None, preference, states=states), users)
    longest = int(lengths.max())
    assert torch.equal(packed.user_vectors(history[:, :longest], lengths, preference), users)
    new = packed.retrieve(history, lengths, preference, k, exclude_history=True)
    kept = packed.retrieve(history, lengths, preference, shape["n_items"])
    for row in range(rows):
        seen = set(history[row].tolist())
        left = [item for item in kept.indices[row].tolist() if item not in seen][:k]
        assert new.indices[row].tolist() == left + [-1] * (k - len(left))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden": 16, "n_heads": 16, "n_experts": 16},
        {"hidden": 512, "inner": 600, "n_heads": 4, "n_items": 300},
        {"hidden": 64, "max_length": 128},
        {"hidden": 32, "max_length": 127, "n_layers": 8},
    ],
)
def test_the_ends_of_the_supported_range(isa: str, shape: dict) -> None:
    model = make(**shape)
    history, lengths, preference = ask(model, 12)
    _C.set_isa(isa)
    users = model.pack().user_vectors(history, lengths, preference)
    assert_as_exact_as_eager(model, users, history, lengths, preference)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", DATA)
def test_reference_checkpoints(name: str, isa: str) -> None:
    config, state, data = reference(name)
    model = PreferenceAwareTRM.from_reference(config, state)
    asked = (data["item_seq"], data["item_seq_len"], data["query_text_emb"])
    _C.set_isa(isa)
    users = model.pack().user_vectors(*asked)
    torch.testing.assert_close(users, data["user_vector"], rtol=0, atol=1e-5)
    found = model.retrieve(*asked, 20)
    expected = data["scores"].topk(20)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-5)
    picked = data["scores"].gather(1, found.indices)
    torch.testing.assert_close(picked, expected.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_split_and_threads_change_nothing(isa: str, dtype: torch.dtype) -> None:
    model = make(n_items=900, max_length=20)
    history, lengths, preference = ask(model, 150)
    _C.set_isa(isa)
    packed = model.pack(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = packed.retrieve(history, lengths, preference, 10, exclude_history=True)
        users = packed.user_vectors(history, lengths, preference)
        one_of_two = packed.user_vectors(history[7:8], lengths[7:8], preference[7:8])
        torch.set_num_threads(1)
        one = packed.retrieve(history, lengths, preference, 10, exclude_history=True)
        alone = packed.user_vectors(history[7:8], lengths[7:8], preference[7:8])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(users[7:8], alone) and torch.equal(one_of_two, alone)


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_weights_cost_little(isa: str) -> None:
    model = make(n_items=2000, hidden=64, n_heads=2, inner=256, max_length=20)
    history, lengths, preference = ask(model, 64)
    _C.set_isa(isa)
    exact = eager(model, history, lengths, preference)
    users = model.pack(torch.bfloat16).user_vectors(history, lengths, preference)
    cosine = torch.nn.functional.cosine_similarity(exact, users)
    assert float(cosine.min()) > 0.999
    assert not torch.equal(exact, users)
    best = model.pack().retrieve(history, lengths, preference, 20).indices
    found = model.pack(torch.bfloat16).retrieve(history, lengths, preference, 20).indices
    shared = (best[:, :, None] == found[:, None]).any(2).float().mean()
    assert float(shared) > 0.9


def test_states_of_an_earlier_turn() -> None:
    model = make()
    history, lengths, preference = ask(model, 11)
    packed = model.pack()
    states = packed.history_states(history, lengths)
    with torch.no_grad():
        torch.testing.assert_close(
            states, model.history_states(history, lengths), rtol=0, atol=1e-5
        )
    for turn in (preference, -preference, None):
        users = packed.user_vectors(history, lengths, turn)
        assert torch.equal(users, packed.user_vectors(None, None, turn, states=states))
        whole = packed.retrieve(history, lengths, turn, 5, exclude_history=True)
        later = packed.retrieve(history, lengths, turn, 5, exclude_history=True, states=states)
        assert torch.equal(whole.indices, later.indices)
        assert torch.equal(whole.values, later.values)
        free = packed.retrieve(None, None, turn, 5, states=states)
        assert torch.equal(free.indices, packed.retrieve(history, lengths, turn, 5).indices)


def test_histories_are_encoded_once() -> None:
    model = make()
    history, lengths, preference = ask(model, 9, shortest=3)
    cache = HistoryStates(capacity=12)

    def turn(rows: list[int]) -> int:
        """Histories that a call encodes; its answer must be that of a call without cache."""
        backends.reset_op_table()
        asked = history[rows], lengths[rows], preference[rows]
        before = len(cache)
        found = model.retrieve(*asked, 5, exclude_history=True, cache=cache)
        expected = model.retrieve(*asked, 5, exclude_history=True)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.values, expected.values)
        calls = backends.op_table().get(("trm_history", "cpu"))
        assert (calls is not None) == (len(cache) != before)
        return len(cache) - before

    assert turn([0, 1, 1, 2, 0]) == 3
    assert turn([2, 1, 0]) == 0
    assert turn([2, 5, 1, 6]) == 2
    with torch.no_grad():
        model.position_embedding.weight += 1.0
    assert turn([0]) == 1 - 5  # of another state of the model nothing is known
    assert turn(list(range(9))) == 8
    more, more_lengths, _ = ask(model, 6, seed=5)
    full = cache.of(model.pack(), more, more_lengths)
    assert len(cache) == 6  # beyond the capacity it starts afresh
    assert torch.equal(full, model.pack().history_states(more, more_lengths))
    with pytest.raises(ValueError, match="capacity"):
        HistoryStates(0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_history_and_exclusions_are_merged(backend: str) -> None:
    model = make(n_items=14)
    history, lengths, preference = ask(model, 6)
    exclude = SeenItems.from_lists([[1, 2], [], [14, 3], [5], [int(history[4, 0]), 7], [9]])
    found = model.retrieve(
        history, lengths, preference, 14, exclude=exclude, exclude_history=True, backend=backend
    )
    for b, row in enumerate(found.indices.tolist()):
        gone = set(history[b].tolist()) | set(
            exclude.ids[exclude.offsets[b] : exclude.offsets[b + 1]].tolist()
        )
        left = set(range(1, 15)) - gone
        assert set(row[: len(left)]) == left
        assert row[len(left) :] == [-1] * (14 - len(left))
    assert torch.isneginf(found.values[found.indices == -1]).all()


def test_backends_agree_and_appear_in_the_op_table() -> None:
    model = make()
    history, lengths, preference = ask(model, 5)
    packed = model.pack()
    backends.reset_op_table()
    for backend in ("cpu", "reference"):
        packed.history_states(history, lengths, backend=backend)
        packed.user_vectors(history, lengths, preference, backend=backend)
        packed.retrieve(history, lengths, preference, 3, backend=backend)
    table = backends.op_table()
    for op in ("trm_history", "trm_user_vectors", "trm_retrieve"):
        assert table[op, "cpu"].calls == table[op, "reference"].calls == 1
        assert f"{op}[cpu]: runs" in backends.explain(op, history)
    one = packed.user_vectors(history, lengths, preference, backend="cpu")
    two = packed.user_vectors(history, lengths, preference, backend="reference")
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no backend 'cudnn'"):
        packed.user_vectors(history, lengths, preference, backend="cudnn")


def test_no_user_no_answer() -> None:
    packed = make().pack()
    history = torch.zeros(0, 9, dtype=torch.int64)
    lengths = torch.zeros(0, dtype=torch.int64)
    found = packed.retrieve(history, lengths, torch.zeros(0, 12), 4, exclude_history=True)
    assert found.values.shape == found.indices.shape == (0, 4)
    assert packed.user_vectors(history, lengths).shape == (0, 24)
    assert packed.history_states(history, lengths).shape == (0, 24)


def test_numpy_and_strides_are_accepted() -> None:
    model = make()
    history, lengths, preference = ask(model, 6)
    expected = model.pack().user_vectors(history, lengths, preference)
    strided = torch.stack([history, history], 2)[:, :, 0]
    assert torch.equal(model.pack().user_vectors(strided, lengths, preference), expected)
    users = model.pack().user_vectors(history.numpy(), lengths.numpy(), preference.numpy())
    assert torch.equal(users, expected)


def test_a_forked_child_answers() -> None:
    model = make(n_items=900)
    history, lengths, preference = ask(model, 3000)
    packed = model.pack()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = packed.retrieve(history, lengths, preference, 4, exclude_history=True)
        child = os.fork()
        if child == 0:  # no pytest in the child: only its exit status counts
            try:
                found = packed.retrieve(history, lengths, preference, 4, exclude_history=True)
                os._exit(0 if torch.equal(found.indices, expected.indices) else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)
