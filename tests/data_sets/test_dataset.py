"""Leave-one-out splits against a slow, literal reading of their definition."""

import numpy as np
import pytest

from deeprec.data import Catalog, Dataset, LoadReport, Requests


def make_dataset(lengths: tuple[int, ...], n_items: int = 50) -> Dataset:
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(n_items)[:length] + 1 for length in lengths])
    titles = tuple(f"Title {item}" for item in range(1, n_items + 1))
    return Dataset(
        catalog=Catalog(titles, ((),) * n_items, titles),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=items.astype(np.int64),
        timestamps=np.arange(len(items), dtype=np.int64) + 1000,
        report=LoadReport("made up", "none"),
    )


@pytest.mark.parametrize(("split", "end"), [("rl", -3), ("valid", -2), ("test", -1)])
@pytest.mark.parametrize("max_history", [1, 5, 20, 60])
def test_requests_follow_the_definition(split: str, end: int, max_history: int) -> None:
    data = make_dataset((4, 9, 40))
    requests = data.requests(split, max_history=max_history)
    assert requests.history.shape == (3, max_history)
    for user in range(3):
        sequence = data.items[data.offsets[user] : data.offsets[user + 1]]
        times = data.timestamps[data.offsets[user] : data.offsets[user + 1]]
        before = sequence[:end][-max_history:]
        length = requests.lengths[user]
        assert requests.targets[user] == sequence[end]
        assert requests.timestamps[user] == times[end]
        np.testing.assert_array_equal(requests.history[user, :length], before)
        np.testing.assert_array_equal(
            requests.history_timestamps[user, :length], times[:end][-max_history:]
        )
        assert not requests.history[user, length:].any()
        assert requests.targets[user] not in requests.history[user]


def test_arrays_are_int64() -> None:
    requests = make_dataset((4, 9)).requests("test")
    assert all(array.dtype == np.int64 for array in vars(requests).values())


def test_users_are_taken_in_the_order_given() -> None:
    data = make_dataset((4, 9, 40))
    picked = data.requests("test", users=[2, 0, 2])
    assert picked.users.tolist() == [2, 0, 2]
    np.testing.assert_array_equal(picked.targets, data.requests("test").targets[[2, 0, 2]])
    assert len(data.requests("test", users=[])) == 0


def test_requests_can_be_cut_and_picked() -> None:
    requests = make_dataset((4, 9, 40)).requests("valid")
    assert requests[1:].users.tolist() == [1, 2]
    assert requests[np.array([2, 0])].users.tolist() == [2, 0]
    assert requests[np.array([True, False, True])].users.tolist() == [0, 2]
    assert requests[1].history.shape == (1, 20)
    assert len(requests[[]]) == 0


def test_requests_of_wrong_shapes_are_refused() -> None:
    column, table = np.zeros(2, np.int64), np.zeros((2, 5), np.int64)
    with pytest.raises(ValueError, match="history"):
        Requests(column, table, column[:1], column, column, table)


@pytest.mark.parametrize("held_out", [0, 1, 2, 3])
def test_training_data_stops_before_the_held_out_items(held_out: int) -> None:
    data = make_dataset((4, 9, 40))
    train = data.train(held_out)
    for user in range(3):
        rows = slice(train.offsets[user], train.offsets[user + 1])
        expected = data.items[data.train_slice(user, held_out)]
        np.testing.assert_array_equal(train.items[rows], expected)
        np.testing.assert_array_equal(
            train.timestamps[rows], data.timestamps[data.train_slice(user, held_out)]
        )
        assert len(expected) == data.offsets[user + 1] - data.offsets[user] - held_out


def test_training_data_never_holds_a_target() -> None:
    data = make_dataset((4, 9, 40))
    for split in ("rl", "valid", "test"):
        for user, target in enumerate(data.requests(split).targets):
            assert target not in data.items[data.train_slice(user)]


def test_requests_at_any_row_see_only_what_came_before() -> None:
    data = make_dataset((4, 9))
    rows = np.array([12, 1, 4 + 5])
    requests = data.requests_at(rows, max_history=3)
    assert requests.users.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(requests.targets, data.items[rows])
    np.testing.assert_array_equal(requests.history[0], data.items[9:12])
    np.testing.assert_array_equal(requests.history[1], [data.items[0], 0, 0])
    with pytest.raises(ValueError, match="first item"):
        data.requests_at(np.array([1, 4]))
    for row in (-1, 13):
        with pytest.raises(IndexError, match="rows"):
            data.requests_at(np.array([row]))


def test_bad_arguments_are_named() -> None:
    data = make_dataset((4, 9))
    with pytest.raises(ValueError, match="split"):
        data.requests("train")
    with pytest.raises(ValueError, match="max_history"):
        data.requests("test", max_history=0)
    with pytest.raises(ValueError, match="held_out"):
        data.train(4)
    for user in (-1, 2):
        with pytest.raises(IndexError, match="users"):
            data.requests("test", users=[user])
        with pytest.raises(IndexError, match="users"):
            data.train_slice(user)
