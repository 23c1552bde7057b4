"""Hierarchical rewards: what a conversation earns, and which format rules it broke."""

from deeprec.rewards.config import RewardConfig
from deeprec.rewards.model import RewardModel, Rewards
from deeprec.rewards.rules import has_valid_list

__all__ = ["RewardConfig", "RewardModel", "Rewards", "has_valid_list"]
