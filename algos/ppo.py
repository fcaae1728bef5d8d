"""PPO over noise patches: clipped ratios of patch log-probabilities, a critic or a per-prompt baseline.

    J = E[ Σ_i min( r_i A_i, clip(r_i, 1 - ε, 1 + ε) A_i ) ],   r_i = π(x_i | x_<i, text) / π_old(x_i | x_<i, text)

with ``log π`` summed over the elements of patch ``i`` (Schulman et al. 2017; NoiseAR, appendix D, names PPO as
future work). The reward comes after the last patch and γ = 1. A patch's log-ratio has a standard deviation of
``√(2·KL)`` whatever its size, so the KL of a step, not the number of elements, decides how much is clipped.

    python algos/ppo.py --config configs/shapes/ppo.yaml
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributions import Independent, Normal, kl_divergence
from tqdm.auto import tqdm

import noisear_rl  # noqa: F401  (registers the environments)
from noisear_rl.config import parse_config
from noisear_rl.envs import make_vector_env
from noisear_rl.gaussian import kl_to_gaussian
from noisear_rl.learning.losses import finite_episodes, generalized_advantages, group_advantages, ppo_loss
from noisear_rl.learning.natural_gradient import PolicyOptimizer
from noisear_rl.learning.run import Counters, Run, take_turns
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, initial_policy
from noisear_rl.policy.critic import NoiseARCritic


@dataclass
class PPOConfig:
    """Options of PPO."""

    env_id: str = "NoiseAR-Shapes-v0"
    """Gymnasium id."""
    denoiser_options: dict[str, str] = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32` or `path FOLDER`."""
    reward: str | None = None
    """Scorer, `FILE.py` or `FILE.yaml`; unset for the environment's default."""
    prompts: str | tuple[str, ...] | None = None
    """Prompts, a text file, or a split of `shapes`; unset for the environment's default."""
    init_from: str | None = None
    """Checkpoint, run folder or Hub id to start from; unset for a fresh policy (Gaussian noise)."""
    policy: NoiseARConfig = field(default_factory=lambda: NoiseARConfig(log_variance="fixed"))
    """A fresh policy, in the environment's sizes. Its log-variance is fixed: learning it spends KL on noise."""
    output_dir: Path = Path("runs/ppo")
    """Run folder."""
    updates: int = 100
    """Rollouts, each followed by `epochs` passes over it."""
    prompts_per_update: int = 4
    """Prompts a rollout; they take turns."""
    samples_per_prompt: int = 64
    """Noises a prompt and rollout. Nats an update should be about proportional to it."""
    epochs: int = 2
    """Passes over a rollout."""
    minibatches: int = 1
    """Parts of a pass; each makes one step."""
    clip_range: float = 0.5
    """Ratios beyond 1 ± this gain nothing; a summed log-ratio wants more than the usual 0.2."""
    advantage: str = "rloo"
    """`none`, `ema`, `group`, `rloo` (one number an episode), or `gae` (a critic, one a patch)."""
    gae_lambda: float = 0.95
    """With `gae`: 1 trusts returns, 0 the critic."""
    critic_learning_rate: float = 1e-3
    """With `gae`: Adam's learning rate for the critic."""
    critic_steps: int = 8
    """With `gae`: steps of the critic a rollout, 256 episodes each."""
    optimizer: str = "natural"
    """`natural` (steps that add up to `target_kl`), `adam` (at `learning_rate`) or `adaptive_adam`."""
    target_kl: float = 1.0
    """Sum of the sizes of an update's steps in nats a whole noise; beyond 1.5 times of it an update stops."""
    damping: float = 0.01
    """Damping of the Fisher matrix."""
    cg_iterations: int = 8
    """Conjugate-gradient iterations a natural step."""
    fisher_episodes: int = 128
    """Episodes that the Fisher matrix is measured on; a step costs about as much as 25 passes over them."""
    learning_rate: float = 2e-4
    """Adam's learning rate."""
    max_grad_norm: float = 1.0
    """Adam's gradients are clipped to this norm."""
    kl_prior_coef: float = 0.0
    """Weight of the KL to N(0, I), in standard deviations of reward a nat."""
    kl_coef: float = 0.0
    """Weight of the KL to the policy that training began with, in the same unit."""
    entropy_coef: float = 0.0
    """Weight of the entropy of the whole noise, in the same unit; matters only if the log-variance is learned."""
    seed: int = 0
    """Seed of initialisation, prompts and noise."""
    save_every: int = 20
    """Updates between checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    wandb: bool = False
    """Also log to Weights & Biases."""


def train(config: PPOConfig) -> NoiseARPolicy:
    """Improves a policy and returns it in eval mode; see the module's docstring."""
    if min(config.epochs, config.minibatches) < 1 or config.clip_range <= 0:
        raise ValueError("epochs and minibatches must be at least 1, and clip_range positive")
    run = Run(config.output_dir, config, resume=config.resume, wandb=config.wandb)

    # Environment: all episodes of an update at once.
    batch = config.prompts_per_update * config.samples_per_prompt
    options = {"prompts": config.prompts, "reward": config.reward, **config.denoiser_options}
    envs = make_vector_env(config.env_id, batch, **options)
    task = envs.task
    n_prompts = min(config.prompts_per_update, len(task.prompts))
    groups = torch.arange(batch) % n_prompts

    # Policy in eval mode, so that the density it samples from is the density it is scored by.
    torch.manual_seed(config.seed)
    policy = initial_policy(config.init_from, config.policy, task.policy_sizes, str(task)).to(run.device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    steps = config.epochs * config.minibatches
    optimizer = PolicyOptimizer(
        policy,
        config.optimizer,
        target_kl=config.target_kl / steps,
        learning_rate=config.learning_rate,
        damping=config.damping,
        cg_iterations=config.cg_iterations,
        fisher_episodes=config.fisher_episodes,
        max_grad_norm=config.max_grad_norm,
    )
    critic = NoiseARCritic(policy.config).to(run.device).eval()
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=config.critic_learning_rate)
    parts: dict[str, Any] = {"optimizer": optimizer}
    if task.reward.normalize == "running":  # else it has no state
        parts |= {"reward": task.reward}
    if config.advantage == "gae":  # else it is never trained
        parts |= {"critic": critic, "critic_optimizer": critic_optimizer}
    counters = run.load(policy, **parts) if config.resume else Counters()
    began = time.time() - counters.seconds

    bar = tqdm(range(counters.step, config.updates), initial=counters.step, total=config.updates, desc="ppo")
    for update in bar:
        turns = take_turns(task.prompts, n_prompts, update, config.seed)
        prompts = [turns[g] for g in groups.tolist()]

        # Rollout: the environment is deterministic up to the end, so all patches are drawn ahead of it.
        rng = np.random.default_rng([config.seed, 2, update])
        seeds = rng.integers(2**62, size=batch)
        observation, _ = envs.reset(seed=[int(s) % 2**31 for s in seeds], options={"prompts": prompts})
        text = torch.from_numpy(observation["text"]).to(run.device)  # (B, L, D)
        mask = torch.from_numpy(observation["text_mask"]).bool().to(run.device)  # (B, L)
        actions = policy.sample(text, mask, seeds=seeds.tolist()).patches.cpu().numpy()  # (B, N, A)
        for patch in range(task.n_patches):
            observation, rewards, *_, info = envs.step(actions[:, patch])
        patches = torch.from_numpy(observation["patches"]).to(run.device)  # clipped as the environment did
        reward = torch.from_numpy(rewards).float().to(run.device)  # (B,)
        kept = finite_episodes(reward, groups.to(run.device))  # the others are dropped and counted
        patches, text, mask, reward, group = (x[kept] for x in (patches, text, mask, reward, groups.to(run.device)))

        # The policy that sampled. Scored by the same pass as in the update, so that the first ratio is exactly 1.
        with torch.no_grad():
            gaussian = policy.distribution(patches, text, mask).base_dist
            old = Independent(Normal(gaussian.mean, gaussian.stddev), 1)
            old_log_prob = old.log_prob(patches)  # (B, N)

        # Advantages in standard deviations of this update's.
        if config.advantage == "gae":
            with torch.no_grad():
                values = critic(patches, text, mask)  # (B, N)
            advantages, returns = generalized_advantages(reward, values, config.gae_lambda)
        else:
            episodic = group_advantages(reward, group, config.advantage, counters.reward_ema)
            advantages = episodic[:, None].expand_as(old_log_prob)
        advantages = advantages / (advantages.std() + 1e-8)
        average = reward.mean().item()
        counters.reward_ema = average if counters.reward_ema is None else 0.9 * counters.reward_ema + 0.1 * average

        # Policy: epochs of minibatches, until the update is as long as it may be.
        ratios, losses, clipped, approx_kl = [], [], [], 0.0
        for step in range(steps):
            if step % config.minibatches == 0:
                count = len(kept)
                order = torch.from_numpy(rng.permutation(count) if config.minibatches > 1 else np.arange(count))
            rows = order.chunk(config.minibatches)[step % config.minibatches]
            distribution = policy.distribution(patches[rows], text[rows], mask[rows])
            log_prob = distribution.log_prob(patches[rows])  # (b, N)
            policy_loss = ppo_loss(log_prob, old_log_prob[rows], advantages[rows], config.clip_range)
            loss = policy_loss + config.kl_prior_coef * kl_to_gaussian(distribution).sum(1).mean()
            loss = loss - config.entropy_coef * distribution.entropy().sum(1).mean()
            if config.kl_coef:
                other = reference.distribution(patches[rows], text[rows], mask[rows])
                loss = loss + config.kl_coef * kl_divergence(distribution, other).sum(1).mean()
            policy.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step(patches[rows], text[rows], mask[rows])
            ratio = (log_prob.detach() - old_log_prob[rows]).exp()
            ratios.append(ratio.mean().item())
            losses.append(policy_loss.item())
            clipped.append(((ratio - 1).abs() > config.clip_range).float().mean().item())
            with torch.no_grad():
                new = policy.distribution(patches, text, mask)
                approx_kl = kl_divergence(old, new).sum(1).mean().item()
            if approx_kl > 1.5 * config.target_kl:
                break

        # Critic: its own network, its own optimiser.
        record = {}
        if config.advantage == "gae":
            for _ in range(config.critic_steps):
                rows = torch.from_numpy(rng.permutation(len(kept))[:256])
                value_loss = 0.5 * (critic(patches[rows], text[rows], mask[rows]) - returns[rows]).square().mean()
                critic_optimizer.zero_grad(set_to_none=True)
                value_loss.backward()
                critic_optimizer.step()
            spread = (reward[:, None] - values).var() / reward.var().clamp(min=1e-12)
            record = {"losses/value_loss": value_loss.item(), "losses/explained_variance": 1 - spread.item()}

        # Records and checkpoints.
        counters.step, counters.images = update + 1, counters.images + batch
        counters.seconds = time.time() - began
        kl_to_prior = kl_to_gaussian(old).sum(1).mean().item()
        record |= {
            "charts/episodic_return": average,
            "charts/dropped_episodes": batch - len(kept),
            "charts/images": counters.images,
            "charts/SPS": counters.images * task.n_patches / counters.seconds,
            "charts/learning_rate": optimizer.adam.param_groups[0]["lr"],
            "losses/policy_loss": float(np.mean(losses)),
            "losses/entropy": old.entropy().sum(1).mean().item(),
            "losses/approx_kl": approx_kl,
            "losses/clipfrac": float(np.mean(clipped)),
            "losses/first_ratio": ratios[0],
            "policy/mean_abs": gaussian.mean.abs().mean().item(),
            "policy/std": gaussian.stddev.mean().item(),
            "policy/kl_to_gaussian": kl_to_prior,
        }
        record |= {key: float(np.mean(info[key][kept.cpu()])) for key in info if key.startswith("reward/")}
        run.log(record, counters.step)
        bar.set_postfix(reward=f"{average:.3f}", kl=f"{kl_to_prior:.1f}")
        if counters.step % config.save_every == 0 or counters.step == config.updates:
            run.save(policy, counters, **parts)
    envs.close()
    run.close()
    return policy


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(PPOConfig, argv, __doc__)
    train(config)
    print(f"policy: {config.output_dir}")


if __name__ == "__main__":
    main()
