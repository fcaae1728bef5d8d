"""Rewards: images and prompts in, one number per image out; higher is better."""

from noisear_rl.rewards.registry import REWARDS, FunctionReward, RewardConfig, RewardSpec, load_reward, reward_config
from noisear_rl.rewards.weighted import Reward, WeightedReward

__all__ = [
    "REWARDS",
    "FunctionReward",
    "Reward",
    "RewardConfig",
    "RewardSpec",
    "WeightedReward",
    "load_reward",
    "reward_config",
]
