"""SeenItems: how exclusions are built and checked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deeprec import SeenItems


def test_from_lists_sorts_and_drops_duplicates() -> None:
    seen = SeenItems.from_lists([[3, 1, 3], [], [2]])
    assert seen.offsets.tolist() == [0, 2, 2, 3]
    assert seen.ids.tolist() == [1, 3, 2]


def test_from_padded_equals_from_lists() -> None:
    history = torch.tensor([[5, 2, 5, 0], [0, 0, 0, 0], [7, 0, 1, 0]])
    for form in (history, history.numpy(), history.to(torch.int32)):
        seen = SeenItems.from_padded(form)
        expected = SeenItems.from_lists([[2, 5], [], [1, 7]])
        assert torch.equal(seen.offsets, expected.offsets)
        assert torch.equal(seen.ids, expected.ids)
    assert SeenItems.from_padded(history, pad=-1).ids.tolist() == [0, 2, 5, 0, 0, 1, 7]


def test_slices_are_batches() -> None:
    seen = SeenItems.from_lists([[1], [2, 3], [], [4]])
    assert len(seen) == 4
    part = seen[1:3]
    assert (part.offsets.tolist(), part.ids.tolist()) == ([0, 2, 2], [2, 3])
    with pytest.raises(ValueError, match="contiguous"):
        seen[::2]


@given(
    rows=st.lists(
        st.tuples(*[st.sets(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4), max_size=6)] * 2),
        max_size=5,
    )
)
def test_union_is_that_of_sets(rows: list[tuple[set[int], set[int]]]) -> None:
    one, other = (SeenItems.from_lists(row[side] for row in rows) for side in (0, 1))
    got, expected = one.union(other), SeenItems.from_lists(a | b for a, b in rows)
    assert torch.equal(got.offsets, expected.offsets)
    assert torch.equal(got.ids, expected.ids)


def test_a_union_of_other_queries_is_refused() -> None:
    with pytest.raises(ValueError, match="other must have 1 rows like this, got 2"):
        SeenItems.from_lists([[1]]).union(SeenItems.from_lists([[1], []]))


@pytest.mark.parametrize(
    ("offsets", "ids", "error", "message"),
    [
        ([0, 2], [2, 1], ValueError, "ascend strictly"),
        ([0, 2], [2**63 - 1, -(2**63)], ValueError, "ascend strictly"),
        ([0, 2], [1, 1], ValueError, "ascend strictly"),
        ([0, 3], [1, 2], ValueError, "ascend from 0 to len"),
        ([0, 2, 1, 2], [1, 2], ValueError, "ascend from 0 to len"),
        ([], [], ValueError, "tensor\\(\\[0\\]\\)"),
        ([[0]], [], ValueError, "1 dimension"),
    ],
)
def test_bad_rows_are_explained(offsets, ids, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SeenItems(torch.tensor(offsets, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64))


def test_wrong_types_are_explained() -> None:
    with pytest.raises(TypeError, match="int64"):
        SeenItems(torch.tensor([0, 0], dtype=torch.int32), torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="integer matrix"):
        SeenItems.from_padded(torch.ones(2, 2))
