"""skrl's PPO with our policy and critic as its models.

    pip install 'noisear-rl[examples]'
    python examples/skrl_ppo.py

skrl flattens observations; the models take them apart again. It wants ``autoreset_mode="SameStep"``, since it never
resets a batch itself.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed
from skrl.utils.spaces.torch import unflatten_tensorized_space

import noisear_rl  # noqa: F401  (registers the environments)
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.policy.critic import NoiseARCritic

PROMPT = "a photo of two red squares"
CONFIG = NoiseARConfig(d_model=32, d_ff=64, n_layers=1, log_variance="fixed")  # untrained, it is N(0, I)


def darkness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """In standard deviations of the images that Gaussian noise gives."""
    return (0.858 - images.mean((1, 2, 3))) / 0.026


class NoiseModel(Model):
    """A network over whole noises; ``at_step`` picks what it says of the patch at each observation's step."""

    def __init__(self, network: NoiseARPolicy | NoiseARCritic, **spaces: Any):
        super().__init__(**spaces)
        self.network = network

    def seen(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        parts = unflatten_tensorized_space(self.observation_space, inputs["observations"])
        self.rows = torch.arange(len(parts["patches"])), parts["step"].flatten().long()
        return parts["patches"], parts["text"], parts["text_mask"]


class Policy(GaussianMixin, NoiseModel):
    def __init__(self, **spaces: Any):
        NoiseModel.__init__(self, NoiseARPolicy(CONFIG), **spaces)
        GaussianMixin.__init__(self, role="policy")

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[torch.Tensor, dict[str, Any]]:
        gaussian = self.network.distribution(*self.seen(inputs)).base_dist
        return gaussian.mean[self.rows], {"log_std": gaussian.stddev.log()[self.rows]}


class Value(DeterministicMixin, NoiseModel):
    def __init__(self, **spaces: Any):
        NoiseModel.__init__(self, NoiseARCritic(CONFIG), **spaces)
        DeterministicMixin.__init__(self, role="value")

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[torch.Tensor, dict[str, Any]]:
        return self.network(*self.seen(inputs))[self.rows][:, None], {}


def main(updates: int = 8, noises: int = 64, seed: int = 0) -> list[float]:
    """Trains, and returns the mean reward of each update's noises."""
    set_seed(seed)
    options = {"prompts": PROMPT, "reward": darkness, "autoreset_mode": "SameStep"}
    envs = gym.make_vec("NoiseAR-ShapesTurbo-v0", noises, "vector_entry_point", None, None, **options)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs, buffer_length=updates * noises)
    env = wrap_env(envs, verbose=False)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": env.device}
    options = {
        "rollouts": 16,  # an episode
        "learning_epochs": 4,
        "mini_batches": 2,
        "discount_factor": 1.0,
        "learning_rate": 1e-3,
        "ratio_clip": 0.5,
        "value_clip": 0.0,
        "value_loss_scale": 0.5,
        "kl_threshold": 0.05,  # per patch
        "experiment": {"write_interval": 0, "checkpoint_interval": 0},
    }
    agent = PPO(
        models={"policy": Policy(**spaces), "value": Value(**spaces)},
        memory=RandomMemory(memory_size=16, num_envs=noises, device=env.device),
        cfg=PPO_CFG(**options),
        **spaces,
    )
    run = {"timesteps": updates * 16, "headless": True, "disable_progressbar": True, "close_environment_at_exit": False}
    SequentialTrainer(env=env, agents=agent, cfg=run).train()
    env.close()
    return np.array(envs.return_queue).reshape(updates, noises).mean(1).tolist()


if __name__ == "__main__":
    print("darkness by update:", np.round(main(), 2))
