"""The fused TRM against the eager module, on every instruction set of the machine."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import reference

from deeprec import _C, backends
from deeprec.ops import SeenItems
from deeprec.trm import HistoryStates, PackedTRM, PreferenceAwareTRM, TRMConfig

ISAS = _C.available_isas()
DATA = sorted(path.stem for path in (Path(__file__).parent.parent / "data").glob("trm_*.npz"))


@pytest.fixture(autouse=True)
def default_isa() -> Iterator[None]:
    yield
    _C.set_isa("auto")


def make(seed: int = 0, *, padding_row: bool = False, **options: Any) -> PreferenceAwareTRM:
    """A model whose every parameter matters."""
    torch.manual_seed(seed)
    shape = {"n_items": 40, "text_dim": 12, "hidden": 24, "inner": 40, "max_length": 9}
    config = TRMConfig(**{**shape, **options})
    model = PreferenceAwareTRM(config, torch.randn(config.n_items, config.text_dim)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        if padding_row:  # as in checkpoints whose initialisation forgot the padding row
            model.item_plm_embedding.weight[0] = torch.randn(config.text_dim)
        else:
            model.item_embedding.weight[0] = 0
    return model


def ask(
    model: PreferenceAwareTRM, rows: int, seed: int = 0, shortest: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    width = model.config.max_length
    lengths = torch.randint(min(shortest, width), width + 1, (rows,), generator=random)
    history = torch.randint(1, model.config.n_items + 1, (rows, width), generator=random)
    history *= torch.arange(width) < lengths[:, None]
    return history, lengths, torch.randn(rows, model.config.text_dim, generator=random)


@torch.no_grad()
def eager(model: PreferenceAwareTRM, history: Any, lengths: Any, preference: Any) -> torch.Tensor:
    return model.with_preference(model.history_states(history, lengths), preference)


def assert_as_exact_as_eager(
    model: PreferenceAwareTRM, users: torch.Tensor, history: Any, lengths: Any, preference: Any
) -> None:
    """Within 1e-5 of the model in float64, and of the eager module but for its own error."""
    exact = eager(copy.deepcopy(model).double(), history, lengths, preference.double())
    own_error = (eager(model, history, lengths, preference) - exact).abs().max()
    assert float((users - exact).abs().max()) <= 1e-5 + 3 * float(own_error)


def assert_same_ranking(model: PreferenceAwareTRM, users: torch.Tensor, found: Any, k: int) -> None:
    """The eager top-k, up to items whose scores differ by less than 1e-5."""
    items = torch.nn.functional.normalize(model.item_embedding.weight[1:].detach(), dim=1)
    scores = torch.nn.functional.normalize(users, dim=1) @ items.T
    best = scores.topk(k)
    torch.testing.assert_close(found.values, best.values, rtol=0, atol=1e-5)
    picked = scores.gather(1, found.indices - 1)
    torch.testing.assert_close(picked, best.values, rtol=0, atol=1e-5)


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
    assert_same_ranking(model, users, found, k)


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
        torch.set_num_threads(1)
        one = packed.retrieve(history, lengths, preference, 10, exclude_history=True)
        alone = packed.user_vectors(history[7:8], lengths[7:8], preference[7:8])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(users[7:8], alone)


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


# ---- bad input ----


def test_bad_requests_name_the_argument() -> None:
    model = make()
    packed = model.pack()
    history, lengths, preference = ask(model, 3, shortest=9)

    def refused(error: type[Exception], match: str, *asked: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            packed.retrieve(*asked, **{"k": 3, **options})

    refused(ValueError, "lengths.*got 0 in row 1", history, torch.tensor([9, 0, 9]), None)
    refused(ValueError, "lengths.*got 10", history, torch.tensor([9, 10, 9]), None)
    refused(ValueError, "lengths.*shape", history, lengths[:2], None)
    refused(TypeError, "lengths.*int64", history, lengths.float(), None)
    refused(TypeError, "history.*int64", history.int(), lengths, None)
    refused(ValueError, "history.*1 to 9", torch.ones(3, 10, dtype=torch.int64), lengths, None)
    refused(ValueError, "history.*shape", history[0], lengths, None)
    for item in (-1, 0, 41, 2**40):
        wrong = history.clone()
        wrong[1, 0] = item
        refused(IndexError, f"history: row 1 holds {item} at position 0", wrong, lengths, None)
    beyond = torch.ones_like(history)
    refused(ValueError, "history.*beyond its length", beyond, torch.tensor([9, 2, 9]), None)
    refused(ValueError, "preference.*text_dim|preference.*12", history, lengths, preference[:, :5])
    refused(ValueError, "preference", history, lengths, preference[:2])
    refused(TypeError, "preference.*float32", history, lengths, preference.double())
    for bad in (float("nan"), float("inf")):
        wrong = preference.clone()
        wrong[2, 4] = bad
        refused(ValueError, "preference: row 2 holds NaN or inf", history, lengths, wrong)
    refused(ValueError, "k must be", history, lengths, None, k=0)
    refused(ValueError, "exclude.*3 rows", history, lengths, None, exclude=SeenItems.from_lists([]))
    refused(ValueError, "exclude", history, lengths, None, exclude=[[1], [2], [3]])
    wrong_ids = SeenItems.from_lists([[1], [41], []])
    refused(IndexError, "exclude: row 1 holds 41", history, lengths, None, exclude=wrong_ids)
    refused(ValueError, "history and lengths", None, None, None)
    refused(ValueError, "states", history, lengths, None, states=torch.zeros(3, 5))
    states = packed.history_states(history, lengths)
    refused(ValueError, "exclude_history", None, None, None, states=states, exclude_history=True)
    states[1, 2] = torch.nan
    refused(ValueError, "states: row 1", None, None, None, states=states)
    with pytest.raises(ValueError, match="dtype"):
        model.pack(torch.float16)


@pytest.mark.parametrize(
    "name", ["item_embedding.weight", "trm_encoder.layer.1.feed_forward.linear_2.bias"]
)
def test_weights_that_are_not_finite_are_named(name: str) -> None:
    model = make()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = torch.nan
    history, lengths, preference = ask(model, 3)
    with pytest.raises(ValueError, match=name):
        model.retrieve(history, lengths, preference, 3)


def test_a_checkpoint_of_another_shape_names_the_tensor() -> None:
    with pytest.raises(RuntimeError, match=r"item_embedding\.weight"):
        make().load_state_dict(make(n_items=41).state_dict())


# ---- staleness ----


def assert_follows(model: PreferenceAwareTRM) -> None:
    asked = ask(model, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            model.pack().user_vectors(*asked), eager(model, *asked), rtol=0, atol=1e-5
        )
        found = model.retrieve(*asked, 5)
        assert_same_ranking(model, eager(model, *asked), found, 5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_an_optimizer_step_is_followed(fused: bool, train: bool) -> None:
    model = make()
    held = model.pack()
    asked = ask(model, 4)
    held.retrieve(*asked, 5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    for _ in range(2):
        if train:
            model.train()
        model.user_vectors(*asked).square().sum().backward()
        if train:
            # Packed within a training step, after the mode was set.
            with model.evaluating():
                assert_follows(model)
        optimizer.step()
        with pytest.raises(RuntimeError, match="changed since"):
            held.user_vectors(*asked)
        with model.evaluating():
            assert_follows(model)
        model.eval()
        assert_follows(model)


def test_an_optimizer_of_other_parameters_changes_nothing() -> None:
    model = make()
    held = model.pack()
    other = torch.nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=1.0).step()
    assert model.pack() is held
    held.user_vectors(*ask(model, 2))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_parameters_is_followed(assign: bool) -> None:
    model = make()
    assert_follows(model)
    model.load_state_dict(make(seed=1).state_dict(), assign=assign)
    assert_follows(model)


def test_every_parameter_is_watched() -> None:
    model = make()
    for name, parameter in model.named_parameters():
        held = model.pack()
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.5
        assert not held.fresh, name
    model.train()
    model.eval()
    assert model.pack() is not held


def test_copies_have_packs_of_their_own() -> None:
    model = make()
    assert_follows(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.item_embedding.weight[1:] += 1
        assert_follows(other)
        assert_follows(model)
    del model
    assert_follows(other)


# ---- files ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make(n_items=700)
    asked = ask(model, 9)
    packed = model.pack(dtype)
    packed.save(tmp_path / "served")
    assert len(list((tmp_path / "served").iterdir())) == 2
    loaded = PackedTRM.load(tmp_path / "served")
    one = packed.retrieve(*asked, 6, exclude_history=True)
    two = loaded.retrieve(*asked, 6, exclude_history=True)
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.values, two.values)
    assert loaded.dtype == dtype
    assert loaded.nbytes == packed.nbytes
    with pytest.raises(RuntimeError, match="no module behind it"):
        loaded.retrieve(*asked, 6, backend="reference")
    # It needs no module.
    del model, packed
    assert torch.equal(loaded.retrieve(*asked, 6, exclude_history=True).indices, two.indices)


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="trm_packed"):
        PackedTRM.load(tmp_path)
    model = make()
    model.save(tmp_path)
    (tmp_path / "trm.safetensors").rename(tmp_path / "trm_packed.safetensors")
    with pytest.raises(ValueError, match="no packed TRM"):
        PackedTRM.load(tmp_path)
    model.pack().save(tmp_path)
    make(seed=1).pack().save(tmp_path / "other")
    (tmp_path / "other" / "trm_items.safetensors").rename(tmp_path / "trm_items.safetensors")
    with pytest.raises(ValueError, match="different models"):
        PackedTRM.load(tmp_path)
