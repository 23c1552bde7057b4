"""Bootstrap intervals and paired differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprec.eval import UserMetrics, bootstrap_means, paired, summarise


def metrics(values, users=None):
    values = np.asarray(values, dtype=np.float64)
    return UserMetrics(
        np.arange(len(values)) if users is None else np.asarray(users), {"ndcg@10": values}
    )


def test_interval_has_the_width_of_the_normal_approximation():
    values = np.random.default_rng(1).random(2000)
    found = summarise(metrics(values))["ndcg@10"]
    error = values.std() / np.sqrt(len(values))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        sample = rng.random(100) < 0.3
        found = summarise(metrics(sample), resamples=500, seed=seed)["ndcg@10"]
        covered += found["low"] <= 0.3 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 300))
def test_same_seed_same_resamples_inside_the_range(seed, users, resamples):
    values = np.random.default_rng(seed).random((users, 2))
    first = bootstrap_means(values, resamples=resamples, seed=seed)
    assert first.shape == (resamples, 2)
    np.testing.assert_array_equal(first, bootstrap_means(values, resamples=resamples, seed=seed))
    assert (first >= values.min(axis=0) - 1e-12).all()
    assert (first <= values.max(axis=0) + 1e-12).all()


def test_columns_share_their_users():
    values = np.random.default_rng(0).random((30, 1))
    means = bootstrap_means(np.hstack([values, 1 - values]), resamples=400)
    np.testing.assert_allclose(means.sum(axis=1), 1)


def test_a_constant_has_no_width():
    found = summarise(metrics([1.0] * 10))["ndcg@10"]
    assert (found["mean"], found["low"], found["high"]) == (1.0, 1.0, 1.0)


def test_pairing_sees_what_intervals_of_means_do_not():
    noise = np.random.default_rng(3).random(800)
    better, worse = metrics(noise + 0.01), metrics(noise)
    found = paired(better, worse)["ndcg@10"]
    assert found["difference"] == pytest.approx(0.01)
    assert found["low"] > 0 and found["p"] < 0.001 and found["users"] == 800
    back = paired(worse, better)["ndcg@10"]
    assert back["difference"] == pytest.approx(-found["difference"])
    assert back["high"] < 0


def test_no_difference_is_not_significant():
    same = metrics(np.random.default_rng(4).random(50))
    assert paired(same, same)["ndcg@10"] == {
        "difference": 0.0,
        "low": 0.0,
        "high": 0.0,
        "p": 1.0,
        "users": 50.0,
    }


def test_p_is_below_5_percent_where_the_interval_leaves_zero_out():
    rng = np.random.default_rng(5)
    for shift in np.linspace(0, 0.2, 30):
        found = paired(metrics(rng.normal(shift, 1, 200)), metrics(np.zeros(200)))["ndcg@10"]
        excluded = found["low"] > 0 or found["high"] < 0
        assert excluded == (found["p"] < 0.05) or abs(found["p"] - 0.05) < 0.002


def test_users_are_aligned_and_the_common_ones_compared():
    first = metrics([0.1, 0.2, 0.3, 0.4], users=[4, 3, 2, 1])
    second = metrics([0.3, 0.2, 0.9], users=[2, 3, 8])
    found = paired(first, second)["ndcg@10"]
    assert found["users"] == 2 and found["difference"] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="share no user"):
        paired(first, metrics([1.0], users=[9]))


def test_no_users_raise():
    with pytest.raises(ValueError, match="at least one user"):
        summarise(metrics([]))
