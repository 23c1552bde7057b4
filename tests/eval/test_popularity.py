"""Popularity of all time and of the days before a request."""

import numpy as np
import pytest

from deeprec.eval import Popularity, RecentPopularity, tune_recent

DAY = 86_400


def test_most_popular_first_ties_by_item():
    popularity = Popularity([2, 2, 2, 5, 5, 1, 3], n_items=5)
    assert popularity.rank(np.array([[0, 0]]), 5).tolist() == [[2, 5, 1, 3, 4]]


def test_history_is_left_out_or_kept():
    popularity = Popularity([2, 2, 2, 3, 3, 1], n_items=3)
    history = np.array([[2, 0], [3, 1]])
    assert popularity.rank(history, 3).tolist() == [[3, 1, 0], [2, 0, 0]]
    kept = popularity.rank(history, 3, exclude_history=False)
    assert kept.tolist() == [[2, 3, 1], [2, 3, 1]]


def test_recent_counts_against_a_plain_count():
    rng = np.random.default_rng(0)
    items, times = rng.integers(1, 9, 300), rng.integers(0, 100 * DAY, 300)
    recent = RecentPopularity(items, times, n_items=8)
    now = rng.integers(0, 110 * DAY, 20)
    candidates = rng.integers(1, 9, (20, 5))
    counts = [
        [
            np.log1p(((items == c) & (times >= t - 10 * DAY) & (times < t)).sum())
            for c in candidates[row]
        ]
        for row, t in enumerate(now)
    ]
    np.testing.assert_allclose(recent.log_counts(now, candidates, 10), counts)


def test_the_moment_of_the_request_itself_is_not_known():
    recent = RecentPopularity([1, 1, 2], [5, 10, 10], n_items=2)
    assert recent.log_counts(np.array([10]), np.array([[1, 2]]), 1) == pytest.approx(
        np.log1p([[1, 0]])
    )


def test_the_blend_follows_what_helps():
    rng = np.random.default_rng(1)
    # Item 3 is taken daily of late, item 4 was taken more often a week ago.
    recent = RecentPopularity([3] * 20 + [4] * 40, [99 * DAY] * 20 + [93 * DAY] * 40, n_items=30)
    candidates = np.repeat(np.arange(1, 31)[None], 200, axis=0)
    scores, now = rng.random((200, 30)) * 0.1, np.full(200, 100 * DAY)
    by_score = tune_recent(scores, candidates, recent, now, 1 + scores.argmax(axis=1))
    assert by_score.weight == 0
    this_week = tune_recent(scores, candidates, recent, now, np.full(200, 3))
    assert this_week.weight > 0 and this_week.days < 7
    last_week = tune_recent(scores, candidates, recent, now, np.full(200, 4))
    assert last_week.weight > 0 and last_week.days >= 7


def test_recent_ranking_leaves_the_history_out():
    recent = RecentPopularity([1, 1, 1, 2, 2, 3], [5] * 6, n_items=3)
    now, history = np.array([9, 9]), np.array([[1, 0], [3, 2]])
    assert recent.rank(now, history, 1, 3).tolist() == [[2, 3, 0], [1, 0, 0]]
    assert recent.rank(now, None, 1, 2).tolist() == [[1, 2], [1, 2]]


def test_bad_items_raise():
    with pytest.raises(ValueError, match=r"items must be 1\.\.3"):
        Popularity([1, 4], n_items=3)
    with pytest.raises(ValueError, match="equally long"):
        RecentPopularity([1, 2], [1], n_items=3)
