"""TorchRL's ``ClipPPOLoss`` with our policy as a TensorDict module.

    pip install 'noisear-rl[examples]'
    python examples/torchrl_ppo.py

``GymEnv(id)`` makes one environment by name; here ``GymWrapper`` wraps the batched one, which denoises all noises at
once. It wants ``autoreset_mode="Disabled"``, since a rollout resets by itself.
"""

import gymnasium as gym
import numpy as np
import torch
from tensordict.nn import InteractionType, TensorDictModule
from torch import nn
from torchrl.envs import GymWrapper
from torchrl.modules import IndependentNormal, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import noisear_rl  # noqa: F401  (registers the environments)
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.policy.critic import NoiseARCritic

PROMPT = "a photo of two red squares"
STEPS, KEYS = 16, ["patches", "step", "text", "text_mask"]
CONFIG = NoiseARConfig(d_model=32, d_ff=64, n_layers=1, log_variance="fixed")  # untrained, it is N(0, I)


def darkness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """In standard deviations of the images that Gaussian noise gives."""
    return (0.858 - images.mean((1, 2, 3))) / 0.026


class AtStep(nn.Module):
    """What a network over whole noises says of the patch at each observation's step, for observations ``(…,)``."""

    def __init__(self, network: NoiseARPolicy | NoiseARCritic):
        super().__init__()
        self.network = network

    def forward(self, patches: torch.Tensor, step: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor):
        batch = step.shape[:-1]  # the step is one-hot
        patches, text, text_mask = (x.flatten(0, len(batch) - 1) for x in (patches, text, text_mask))
        step = step.reshape(len(patches), -1).int().argmax(1).clamp(max=STEPS - 1)  # after the end nothing is asked
        rows = torch.arange(len(patches))
        if isinstance(self.network, NoiseARCritic):
            return self.network(patches, text, text_mask)[rows, step].reshape(*batch, 1)
        gaussian = self.network.distribution(patches, text, text_mask).base_dist
        return tuple(x[rows, step].unflatten(0, batch) for x in (gaussian.mean, gaussian.stddev))


def main(updates: int = 8, noises: int = 64, seed: int = 0) -> list[float]:
    """Trains, and returns the mean reward of each update's noises."""
    torch.manual_seed(seed)
    options = {"prompts": PROMPT, "reward": darkness, "autoreset_mode": "Disabled"}
    env = GymWrapper(gym.make_vec("NoiseAR-ShapesTurbo-v0", noises, "vector_entry_point", None, None, **options))
    env.set_seed(seed)
    actor = ProbabilisticActor(
        TensorDictModule(AtStep(NoiseARPolicy(CONFIG)), KEYS, ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=True,
    )
    critic = TensorDictModule(AtStep(NoiseARCritic(CONFIG)), KEYS, ["state_value"])
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic, deactivate_vmap=True)  # attention has no batching rule
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.5, entropy_bonus=False, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    returns = []
    for update in range(updates):
        with torch.no_grad():
            batch = env.rollout(STEPS, actor)  # (noises, STEPS)
            advantage(batch)
        returns.append(batch["next", "reward"].sum(1).mean().item())
        print(f"update {update}: darkness {returns[-1]:.2f}")
        rows = batch.reshape(-1)
        for _ in range(4):
            for part in torch.randperm(len(rows)).chunk(2):
                losses = loss(rows[part])
                if losses["kl_approx"] > 0.05:  # per patch
                    break
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
            if losses["kl_approx"] > 0.05:
                break
    env.close()
    return returns


if __name__ == "__main__":
    print("darkness by update:", np.round(main(), 2))
