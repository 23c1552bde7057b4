"""AllowedTokens: construction, slicing and refusals."""

import pytest
import torch

from deeprec import AllowedTokens


def test_from_lists_sorts_and_drops_duplicates():
    allowed = AllowedTokens.from_lists([[5, 1, 5], None, [], [0]])
    assert allowed.offsets.tolist() == [0, 2, 2, 2, 3]
    assert allowed.ids.tolist() == [1, 5, 0]
    assert len(allowed) == 4


def test_mask_of_an_empty_row_is_unrestricted():
    mask = AllowedTokens.from_lists([[1], None]).mask(3)
    assert mask.tolist() == [[False, True, False], [True, True, True]]


def test_slices_are_batches():
    allowed = AllowedTokens.from_lists([[1], None, [2, 3], [4]])
    part = allowed[1:3]
    assert part.offsets.tolist() == [0, 0, 2] and part.ids.tolist() == [2, 3]
    assert len(allowed[4:9]) == 0
    with pytest.raises(ValueError, match="contiguous"):
        allowed[::2]


@pytest.mark.parametrize(
    ("offsets", "ids", "message"),
    [
        (torch.tensor([0, 1]), torch.tensor([1], dtype=torch.int32), "ids must be int64"),
        (torch.tensor([[0, 1]]), torch.tensor([1]), "1 dimension"),
        (torch.tensor([0, 2]), torch.tensor([1]), "ascend from 0 to len"),
        (torch.tensor([0, 2, 1]), torch.tensor([1]), "ascend from 0 to len"),
        (torch.tensor([0, 2]), torch.tensor([1, 1]), "strictly ascending"),
        (torch.tensor([0, 2]), torch.tensor([3, 1]), "strictly ascending"),
        (torch.tensor([0, 1]), torch.tensor([-1]), "non-negative"),
        (torch.tensor([], dtype=torch.long), torch.tensor([1]), "rows \\+ 1"),
    ],
)
def test_bad_rows_are_named(offsets, ids, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AllowedTokens(offsets, ids)
