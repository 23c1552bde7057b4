"""A packed TRM answers the same whatever torch's defaults are, and whoever asks first."""

from __future__ import annotations

import copy
import multiprocessing
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_trm import ask, eager, make

from deeprec import ItemIndex
from deeprec.ops import SeenItems


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", [None, "meta"])
def test_default_dtype_and_device_change_nothing(
    defaults: None, dtype: torch.dtype, device: str | None
) -> None:
    model = make(n_items=900)
    asked = ask(model, 70)
    rows = torch.nn.functional.normalize(torch.randn(900, 24), dim=1)
    rows[1::2] = rows[::2] + 0.01 * torch.randn(450, 24)  # codes of a second level
    users, found = model.pack().user_vectors(*asked), model.retrieve(*asked, 7)
    expected = ItemIndex(rows, metric="cosine").search(users, 7)
    model.train().eval()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    assert torch.equal(model.pack().user_vectors(*asked), users)
    again = model.retrieve(*asked, 7)
    assert torch.equal(again.values, found.values) and torch.equal(again.indices, found.indices)
    other = ItemIndex(rows, metric="cosine").search(users, 7)
    assert torch.equal(other.values, expected.values)


def test_a_pack_made_under_autocast_is_the_same() -> None:
    model = make()
    asked = ask(model, 4)
    users = model.pack().user_vectors(*asked)
    model.train().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = model.user_vectors(*asked)
    assert torch.equal(first, users)
    assert torch.equal(model.pack().user_vectors(*asked), users)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_another_dtype(dtype: torch.dtype) -> None:
    model = copy.deepcopy(make()).to(dtype)
    asked = ask(model, 4)
    same = copy.deepcopy(model).float()
    torch.testing.assert_close(
        model.pack().user_vectors(*asked), eager(same, *asked), rtol=0, atol=1e-2
    )
    # Texts go through the adaptor in the module's own dtype.
    exact = dtype == torch.float64
    best, found = same.retrieve(*asked, 5), model.retrieve(*asked, 5)
    shared = (best.indices[:, :, None] == found.indices[:, None]).any(2).float().mean()
    assert float(shared) == 1 if exact else float(shared) > 0.8


def test_threads_that_ask_first_at_the_same_time() -> None:
    model = make(n_items=3000, hidden=64, n_heads=2, text_dim=64)
    asked = ask(model, 8)
    expected = model.pack().retrieve(*asked, 5)
    for _ in range(5):
        model.train().eval()
        packed, start, found = model.pack(), threading.Barrier(4), []

        def request(packed: Any = packed, start: Any = start, found: Any = found) -> None:
            start.wait()
            found.append(packed.retrieve(*asked, 5))

        threads = [threading.Thread(target=request) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for one in found:
            assert torch.equal(one.values, expected.values)


def test_once_is_computed_once() -> None:
    """Also where Python's cached_property has no lock (3.12 on)."""
    from deeprec.trm.packed import PackedTRM, _once

    class Slow(PackedTRM):
        def __init__(self) -> None:
            self._lock = threading.RLock()
            self.calls = 0

        @_once
        def value(self) -> object:
            self.calls += 1
            seen.wait(0.2)
            return object()

    seen, slow, values = threading.Event(), Slow(), []
    threads = [threading.Thread(target=lambda: values.append(slow.value)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow.calls == 1 and len(set(map(id, values))) == 1


def test_many_users_with_exclusions_over_two_threads() -> None:
    model = make(n_items=300, max_length=20)
    history, lengths, preference = ask(model, 200)
    history[:, 1::3] = history[:, ::3][:, : history[:, 1::3].shape[1]]  # items seen twice
    history *= torch.arange(20) < lengths[:, None]
    random = torch.Generator().manual_seed(0)
    lists = [
        torch.randperm(300, generator=random)[: 3 * (row % 90)].add(1).tolist()
        for row in range(200)
    ]
    lists[7] = list(range(1, 301))  # nothing is left
    exclude = SeenItems.from_lists(lists)
    expected = model.retrieve(
        history, lengths, preference, 9, exclude=exclude, exclude_history=True, backend="reference"
    )
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = model.retrieve(
                history, lengths, preference, 9, exclude=exclude, exclude_history=True
            )
            torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-5)
            for row in range(200):
                gone = set(lists[row]) | set(history[row].tolist())
                assert not gone & set(found.indices[row].tolist())
    finally:
        torch.set_num_threads(threads)
    assert found.indices[7].tolist() == [-1] * 9


def test_a_forked_child_asks() -> None:
    model = make(n_items=3000)
    asked = ask(model, 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        index = ItemIndex(model.item_embedding.weight.detach()[1:], metric="cosine")
        expected = model.retrieve(*asked, 5)  # this process has threads from here on
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()

        def child() -> None:
            users = model.pack().user_vectors(*asked)
            rows, ids = index.search(users, 5).indices, model.retrieve(*asked, 5).indices
            queue.put([rows.tolist(), ids.tolist()])

        process = context.Process(target=child)
        process.start()
        process.join(60)
        hung = process.is_alive()
        process.kill()
    finally:
        torch.set_num_threads(threads)
    assert not hung and process.exitcode == 0
    rows, ids = queue.get()
    assert ids == expected.indices.tolist()
    assert [[row + 1 for row in best] for best in rows] == ids
