"""Stable-Baselines3's PPO on the batched environment, with our transformer as its features.

    pip install 'noisear-rl[examples]'
    python examples/sb3_ppo.py

What differs from stock options, with which 4,096 episodes did not raise the default reward:

* rewards in standard deviations: Stable-Baselines3's critic starts with random values of this size,
* ``gamma=1`` and ``gae_lambda=1``: the only reward comes after the last patch,
* many noises per update: each says little about 256 numbers,
* the prior's standard deviation of 1, kept: learning it is the easiest way to lose diversity,
* ``target_kl``, per patch, to end an update, and a ``clip_range`` that lets it get there.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv

import noisear_rl  # noqa: F401  (registers the environments)
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy

PROMPT = "a photo of two red squares"
SMALL = NoiseARConfig(d_model=32, d_ff=64, n_layers=1)


def darkness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """In standard deviations of the images that Gaussian noise gives."""
    return (0.858 - images.mean((1, 2, 3))) / 0.026


class BatchedNoise(VecEnv):
    """Our batched environment as Stable-Baselines3's, so that all noises are denoised at once."""

    def __init__(self, envs: Any):
        self.envs, self.returns = envs, list[float]()
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        observation, self.reset_infos = self.envs.reset(seed=self._seeds)[0], [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        observation, rewards, ended, _, _ = self.envs.step(self.actions)
        if ended.all():  # the observation is the next episodes' first one
            self.returns.append(float(rewards.mean()))
            print(f"update {len(self.returns)}: darkness {self.returns[-1]:.2f}")
        return observation, rewards, ended, [{} for _ in rewards]

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.envs, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("the copies are one environment")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("the copies are one environment")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


class PrefixFeatures(BaseFeaturesExtractor):
    """What our transformer makes of the text and the patches so far: ``(B, d)``."""

    def __init__(self, observation_space: gym.spaces.Dict, config: NoiseARConfig):
        super().__init__(observation_space, config.d_model)
        self.transformer = NoiseARPolicy(config)

    def train(self, mode: bool = True) -> "PrefixFeatures":
        return super().train(False)  # it has no dropout, and computes equal texts once

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        step = observations["step"].flatten(1).argmax(1)  # Stable-Baselines3 gives it one-hot
        features = self.transformer.features(observations["patches"], observations["text"], observations["text_mask"])
        return features[torch.arange(len(step)), step]


def main(updates: int = 8, noises: int = 64, seed: int = 0) -> list[float]:
    """Trains, and returns the mean reward of each update's noises."""
    torch.manual_seed(seed)
    options = {"prompts": PROMPT, "reward": darkness, "autoreset_mode": "SameStep"}
    envs = BatchedNoise(gym.make_vec("NoiseAR-ShapesTurbo-v0", noises, "vector_entry_point", None, None, **options))
    model = PPO(
        "MultiInputPolicy",
        envs,
        n_steps=16,  # an episode
        batch_size=16 * noises // 2,
        n_epochs=4,
        learning_rate=5e-4,
        gamma=1.0,
        gae_lambda=1.0,
        clip_range=0.5,
        target_kl=0.05,
        policy_kwargs={
            "features_extractor_class": PrefixFeatures,
            "features_extractor_kwargs": {"config": SMALL},
            "net_arch": [],
            "log_std_init": 0.0,
        },
        seed=seed,
        device="cpu",
    )
    model.policy.log_std.requires_grad_(False)
    model.learn(updates * 16 * noises)
    return envs.returns


if __name__ == "__main__":
    print("darkness by update:", np.round(main(), 2))
