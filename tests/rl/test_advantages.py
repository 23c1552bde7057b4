"""Advantage estimators against their formulas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeprec.rl.advantages import (
    ADVANTAGES,
    center,
    dr_grpo,
    get_advantage,
    grpo,
    register,
    reinforce_baseline,
    rloo,
    whiten,
)

GROUPS = np.array([0, 0, 0, 1, 1, 1])
RETURNS = np.array([[1.0], [2.0], [6.0], [5.0], [5.0], [5.0]])
TOKENS = np.array([[3], [1], [2], [4], [1], [1]])


def test_center_subtracts_the_group_mean() -> None:
    expected = [[-2.0], [-1.0], [3.0], [0.0], [0.0], [0.0]]
    np.testing.assert_allclose(center(RETURNS, GROUPS, TOKENS), expected)
    np.testing.assert_allclose(dr_grpo(RETURNS, GROUPS, TOKENS), expected)


def test_reinforce_baseline_is_whitened_over_tokens_not_trajectories() -> None:
    advantages = reinforce_baseline(RETURNS, GROUPS, TOKENS)
    every_token = np.repeat(advantages[:, 0], TOKENS[:, 0])
    assert abs(every_token.mean()) < 1e-12
    assert abs(every_token.std() - 1) < 1e-12
    centered = np.repeat([-2.0, -1.0, 3.0, 0.0, 0.0, 0.0], TOKENS[:, 0])
    np.testing.assert_allclose(every_token, (centered - centered.mean()) / centered.std())


def test_reinforce_baseline_clips_outliers_before_whitening() -> None:
    wild = np.array([[1000.0], [0.0], [0.0], [0.0]])
    groups, tokens = np.zeros(4, dtype=np.int64), np.ones((4, 1), dtype=np.int64)
    clipped = np.array([[10.0], [-10.0], [-10.0], [-10.0]])
    np.testing.assert_allclose(reinforce_baseline(wild, groups, tokens), whiten(clipped, tokens))


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    expected = [[1 - 4], [2 - 3.5], [6 - 1.5], [0], [0], [0]]
    np.testing.assert_allclose(rloo(RETURNS, GROUPS, TOKENS), expected)


def test_grpo_divides_by_the_group_deviation() -> None:
    advantages = grpo(RETURNS, GROUPS, TOKENS)
    deviation = np.std([1.0, 2.0, 6.0], ddof=1)
    np.testing.assert_allclose(advantages[:3, 0], np.array([-2, -1, 3]) / (deviation + 1e-4))
    np.testing.assert_array_equal(advantages[3:], 0)


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_equal_returns_are_no_signal(name: str) -> None:
    returns = np.full((8, 1), 1 / 3)
    groups, tokens = np.repeat([0, 1], 4), np.arange(1, 9).reshape(8, 1)
    np.testing.assert_allclose(get_advantage(name)(returns, groups, tokens), 0, atol=1e-9)


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_absent_segments_are_never_read(name: str) -> None:
    rng = np.random.default_rng(0)
    returns, tokens = rng.normal(size=(6, 3)), rng.integers(0, 3, (6, 3))
    spoiled = np.where(tokens == 0, np.nan, returns)
    advantages = get_advantage(name)(spoiled, GROUPS, tokens)
    np.testing.assert_array_equal(advantages, get_advantage(name)(returns, GROUPS, tokens))
    assert (advantages[tokens == 0] == 0).all()


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_a_sample_alone_in_its_group_is_finite(name: str) -> None:
    advantages = get_advantage(name)(np.ones((1, 1)), np.zeros(1, dtype=np.int64), np.ones((1, 1)))
    assert advantages[0, 0] == 0


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31))
def test_segments_do_not_mix(n: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    returns, tokens = rng.normal(size=(n, width)), rng.integers(1, 5, (n, width))
    groups = rng.integers(0, 4, n)
    for function in (center, grpo, rloo):
        together = function(returns, groups, tokens)
        for column in range(width):
            part = slice(column, column + 1)
            alone = function(returns[:, part], groups, tokens[:, part])
            np.testing.assert_allclose(together[:, part], alone)


def test_the_registry_names_its_members() -> None:
    with pytest.raises(ValueError, match=r"reinforce\+\+_baseline, grpo, rloo, dr_grpo"):
        get_advantage("ppo")
    with pytest.raises(ValueError, match="registered twice"):
        register("grpo")(grpo)
