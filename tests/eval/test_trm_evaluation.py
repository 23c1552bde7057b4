"""Full-catalogue evaluation through ``trm.retrieve``."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deeprec.data import Requests
from deeprec.eval import (
    Popularity,
    RecentPopularity,
    evaluate_popularity,
    evaluate_recent_popularity,
    evaluate_trm,
    evaluate_trm_with_date,
)

N_ITEMS, USERS, DAY = 40, 1100, 86_400  # more users than one batch holds


def make_requests(seed=0, when=100 * DAY):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, USERS)
    history = np.where(np.arange(5) < lengths[:, None], rng.integers(1, N_ITEMS + 1, (USERS, 5)), 0)
    return Requests(
        users=np.arange(USERS),
        history=history,
        lengths=lengths,
        targets=rng.integers(1, N_ITEMS + 1, USERS),
        timestamps=np.full(USERS, when),
        history_timestamps=np.zeros((USERS, 5), dtype=np.int64),
    )


class LastItemTRM(torch.nn.Module):
    """Scores an item by its nearness to the last of the history, or to the preference."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(n_items=N_ITEMS)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def retrieve(self, history, lengths, preference, k, *, exclude_history):
        centre = history.gather(1, lengths[:, None] - 1).float()
        if preference is not None:
            centre = preference.float()
        scores = -(torch.arange(N_ITEMS + 1) - centre).abs() / N_ITEMS
        scores[:, 0] = -torch.inf
        if exclude_history:
            scores.scatter_(1, history, -torch.inf)
        values, indices = scores.topk(k)
        return SimpleNamespace(values=values, indices=indices.masked_fill(values == -torch.inf, -1))


def test_history_is_excluded_or_kept():
    requests = make_requests()
    last = requests.history[np.arange(USERS), requests.lengths - 1]
    requests = Requests(**{**vars(requests), "targets": last})
    kept = evaluate_trm(LastItemTRM(), requests, exclude_history=False)
    assert kept.values["recall@1"].mean() == 1 and kept.users.tolist() == list(range(USERS))
    assert evaluate_trm(LastItemTRM(), requests).values["recall@10"].mean() == 0


def test_preferences_reach_the_trm_batch_by_batch():
    requests = make_requests()
    wish = torch.from_numpy(requests.targets)[:, None]
    found = evaluate_trm(LastItemTRM(), requests, exclude_history=False, preference=wish)
    assert found.values["recall@1"].mean() == 1
    with pytest.raises(ValueError, match="one row a request"):
        evaluate_trm(LastItemTRM(), requests, preference=wish[:3])


def test_a_short_list_where_k_is_below_ten():
    found = evaluate_trm(LastItemTRM(), make_requests(), k=1)
    np.testing.assert_array_equal(found.values["recall@1"], found.values["recall@10"])


def test_the_date_helps_where_what_is_recent_is_taken():
    validation, test = make_requests(1), make_requests(2)
    for requests in (validation, test):  # everybody takes one of the two items of the week
        requests.targets[:] = 7 + np.arange(USERS) % 2 * 20
    recent = RecentPopularity([7, 27] * 50, [99 * DAY] * 100, N_ITEMS)
    found, blend = evaluate_trm_with_date(
        LastItemTRM(),
        test,
        validation,
        recent=recent,
        recent_validation=recent,
        exclude_history=False,
    )
    alone = evaluate_trm(LastItemTRM(), test, exclude_history=False)
    assert blend.weight > 0
    assert found.values["recall@5"].mean() == 1 > alone.values["recall@5"].mean()


def test_recent_popularity_with_a_tuned_window():
    validation, test = make_requests(1), make_requests(2, when=101 * DAY)
    for requests in (validation, test):
        requests.targets[:] = 7
    old, new = RecentPopularity([7, 9, 9], [0, 0, 0], N_ITEMS), [98 * DAY, 90 * DAY, 90 * DAY]
    recent = RecentPopularity([7, 9, 9], new, N_ITEMS)
    found, days = evaluate_recent_popularity(
        test, validation, recent=recent, recent_validation=recent, exclude_history=False
    )
    assert days in {3, 7} and found.values["recall@1"].mean() == 1
    found, _ = evaluate_recent_popularity(test, validation, recent=old, recent_validation=recent)
    assert found.values["recall@1"].mean() == 0


def test_popularity_over_all_requests():
    requests = make_requests()
    requests.targets[:] = 3
    popularity = Popularity([3, 3, 4], N_ITEMS)
    found = evaluate_popularity(popularity, requests)
    in_history = (requests.history == 3).any(axis=1)
    np.testing.assert_array_equal(found.values["recall@1"], ~in_history)
    kept = evaluate_popularity(popularity, requests, exclude_history=False)
    assert kept.values["recall@1"].mean() == 1
