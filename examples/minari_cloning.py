"""Episodes recorded by Minari, and a policy that imitates the best of them.

    pip install 'noisear-rl[examples]'
    python examples/minari_cloning.py

Observations repeat the text at every step, and hold the actions so far. The callback records only their step, which
makes a recording far smaller; the prompt is among the recorded infos. A reward given by name lets Minari make the same
environment again.
"""

from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch

from noisear_rl.envs import make_vector_env
from noisear_rl.learning.losses import nll_loss
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy

NAME = "noisear/shapes-turbo/gaussian-v0"


class OnlyTheStep(minari.StepDataCallback):
    """Keeps the step of observations and the prompt of infos."""

    def __call__(self, env: gym.Env, **kwargs: Any) -> Any:
        step_data = super().__call__(env, **kwargs)
        step_data["observation"] = step_data["observation"]["step"]
        step_data["info"] = {"prompt": step_data["info"]["prompt"]}
        return step_data


def record(episodes: int, seed: int) -> minari.MinariDataset:
    """Episodes of Gaussian noise."""
    env = gym.make("NoiseAR-ShapesTurbo-v0", prompts="a photo of two red squares", reward="brightness")
    space = env.observation_space["step"]
    env = minari.DataCollector(env, OnlyTheStep, record_infos=True, observation_space=space, data_format="parquet")
    rng = np.random.default_rng(seed)
    for episode in range(episodes):
        env.reset(seed=seed + episode)
        for _ in range(16):
            env.step(rng.standard_normal(16, dtype=np.float32))
    dataset = env.create_dataset(NAME, algorithm_name="N(0, I)", description="Gaussian noise for one caption")
    env.close()
    return dataset


def imitate(noises: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, seed: int) -> NoiseARPolicy:
    """Maximises the likelihood of noises ``(B, N, A)``, in few steps: there are more numbers in a noise than noises."""
    torch.manual_seed(seed)
    policy = NoiseARPolicy(NoiseARConfig(d_model=32, d_ff=64, n_layers=1, log_variance="fixed")).eval()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for _ in range(40):
        loss = nll_loss(policy.distribution(noises, text, mask), noises)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def main(episodes: int = 256, kept: int = 64, seed: int = 0) -> list[float]:
    """Records unless that was done before, imitates, and returns the mean reward of recording and policy."""
    dataset = minari.load_dataset(NAME) if NAME in minari.list_local_datasets() else record(episodes, seed)
    recorded = list(dataset.iterate_episodes())
    rewards = np.array([episode.rewards.sum() for episode in recorded])
    best = np.argsort(rewards)[-kept:]
    noises = torch.from_numpy(np.stack([recorded[i].actions for i in best]))  # (kept, N, A)
    prompts = [str(recorded[i].infos["prompt"][0]) for i in best]

    envs = make_vector_env("NoiseAR-ShapesTurbo-v0", kept, prompts=sorted(set(prompts)), reward="brightness")
    text, mask = envs.begin(seed=seed, prompts=prompts)
    policy = imitate(noises, text, mask, seed)
    outcome = envs.play(policy.sample(text, mask, seeds=range(kept)).patches)
    return [float(rewards.mean()), float(outcome.rewards.mean())]


if __name__ == "__main__":
    print("brightness of the recording and of the policy:", np.round(main(), 3))
