"""Rewards: images and prompts in, one number per image out; higher is better."""

from noisear_rl.rewards.registry import (
    REWARDS,
    FunctionReward,
    RewardConfig,
    RewardLike,
    RewardSpec,
    check_reward,
    load_reward,
    reward_config,
    reward_sha256,
)
from noisear_rl.rewards.weighted import Reward, WeightedReward

__all__ = [
    "REWARDS",
    "FunctionReward",
    "Reward",
    "RewardConfig",
    "RewardLike",
    "RewardSpec",
    "WeightedReward",
    "check_reward",
    "load_reward",
    "reward_config",
    "reward_sha256",
]
