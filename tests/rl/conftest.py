"""The small world of ``rl_world``, as fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import rl_world
from rl_world import ToyRewards, World
from torch import Tensor
from transformers import Qwen2ForCausalLM

from deeprec.rewards import Rewards
from deeprec.rollout import Trajectory


@pytest.fixture
def tiny_policy() -> Callable[..., Qwen2ForCausalLM]:
    return rl_world.tiny_policy


@pytest.fixture
def make_rewards() -> Callable[..., Rewards]:
    return rl_world.make_rewards


@pytest.fixture
def make_trajectory() -> Callable[..., Trajectory]:
    return rl_world.make_trajectory


@pytest.fixture
def make_world() -> Callable[..., World]:
    return rl_world.make_world


@pytest.fixture(scope="session")
def _warm_weights() -> dict[str, Tensor]:
    world = rl_world.make_world()
    world.warm_start(80)
    return world.policy.state_dict()


@pytest.fixture
def warm_world(_warm_weights: dict[str, Tensor]) -> Callable[[], World]:
    """Worlds with the same policy, which knows the form of a conversation."""

    def make() -> World:
        world = rl_world.make_world()
        world.policy.load_state_dict(_warm_weights)
        world.policy.eval()
        return world

    return make


@pytest.fixture
def toy_rewards() -> type[ToyRewards]:
    return ToyRewards
