"""PPO over noise patches: clipped ratios of patch log-probabilities, with a per-prompt baseline or a critic.

    J = E[ Σ_i min( r_i A_i, clip(r_i, 1 - ε, 1 + ε) A_i ) ],   r_i = π(x_i | x_<i, text) / π_old(x_i | x_<i, text)

with ``log π`` summed over the elements of patch ``i`` (Schulman et al. 2017; NoiseAR, appendix D, names PPO as
future work). The reward comes after the last patch and γ = 1. A patch's log-ratio has a standard deviation of
``√(2·KL)`` whatever its size, so the KL of a step, not the number of elements, decides how much is clipped.
Updates are as long as rewards confirm them (``learning/step_size.py``), so that pure noise moves next to nothing.

``--advantage grpo`` makes it GRPO (Shao et al. 2024), ``--clip-high`` adds the clip-higher of DAPO (Yu et al. 2025):
trl's loss up to a factor, since advantages are in standard deviations of the whole update.

    noisear ppo --config shapes/ppo

Several processes share the episodes of an update (``noisear_rl/distributed.py``); their number changes no result.

Shapes: ``B`` episodes of an update, ``M`` of them in this process; ``K`` with a finite reward, ``k`` of them in this
process; ``b`` of a micro-batch; ``N`` patches, ``A`` elements per patch, ``L`` text tokens, ``D`` text width.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.distributions import kl_divergence
from tqdm.auto import tqdm

import noisear_rl  # noqa: F401  (registers the environments)
from noisear_rl.command import run_script
from noisear_rl.config import (
    Float,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_config,
    parse_config,
)
from noisear_rl.denoisers import DenoiserName, DenoiserOptions
from noisear_rl.distributed import all_sum, among, is_main, same_everywhere, shard, sum_gradients
from noisear_rl.envs import EnvId, make_vector_env
from noisear_rl.gaussian import kl_to_gaussian, rows_of
from noisear_rl.learning.guards import CollapseWatch, Guard, finite_gradients
from noisear_rl.learning.losses import (
    check_groups,
    finite_episodes,
    generalized_advantages,
    group_advantages,
    ppo_loss,
    standardized,
)
from noisear_rl.learning.natural_gradient import Optimizer, PolicyOptimizer
from noisear_rl.learning.run import Counters, Run, next_prompts
from noisear_rl.learning.step_size import Step, StepSize, agreement
from noisear_rl.learning.text_pathway import cross_talk, fit_text
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, Precision, initial_policy, text_encoder_of
from noisear_rl.policy.critic import NoiseARCritic
from noisear_rl.rewards import RewardSpec
from noisear_rl.seeds import Stream, stream_rng


@dataclass
class PPOConfig:
    """Options of PPO."""

    env_id: EnvId = "NoiseAR-Shapes-v0"
    """Gymnasium id."""
    denoiser: DenoiserName | None = None
    """Name, pipeline folder or `module:Class` of a denoiser to use instead of the environment's; unset for its own."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32` or `path FOLDER`."""
    reward: RewardSpec | None = None
    """Scorer, `FILE.py` or `FILE.yaml`; unset for the environment's default."""
    reward_device: str | None = None
    """Device of the scorers, such as `cuda:1` or `cpu`; unset for the accelerator if there is one."""
    prompts: str | tuple[str, ...] | None = None
    """Prompts, a prompt file, a published set, or a split of `shapes`; unset for the environment's default."""
    init_from: str | None = None
    """Checkpoint, run folder, `shapes/NAME` or Hub id to start from; unset for a fresh policy (Gaussian noise)."""
    policy: NoiseARConfig = field(default_factory=lambda: NoiseARConfig(log_variance="fixed"))
    """A fresh policy, in the environment's sizes. Its log-variance is fixed: learning it spends KL on noise."""
    output_dir: Path = Path("runs/ppo")
    """Run folder."""
    updates: PositiveInt = 100
    """Rollouts, each followed by `epochs` passes over it."""
    prompts_per_update: PositiveInt = 4
    """Prompts per rollout, cycled in shuffled order."""
    samples_per_prompt: PositiveInt = 64
    """Noises per prompt and rollout. `target_kl` should be about proportional to it."""
    epochs: PositiveInt = 2
    """Passes over a rollout."""
    minibatches: PositiveInt = 1
    """Minibatches per pass; each makes one step."""
    clip_range: PositiveFloat = 0.5
    """Ratios beyond 1 ± this gain nothing; a summed log-ratio needs more than the usual 0.2."""
    clip_high: PositiveFloat | None = None
    """Instead of `clip_range` for ratios above 1, usually larger (clip-higher of DAPO); unset for the same."""
    advantage: Literal["none", "ema", "rloo", "grpo", "gae"] = "rloo"
    """Baseline, one number per episode: `none`, `ema`, `rloo` (leave one out), `grpo` (group mean and standard
    deviation); or `gae` (a critic, one advantage per patch)."""
    ema_decay: Fraction = 0.9
    """With `ema`: decay of the running mean of rewards, per update."""
    gae_lambda: Fraction = 0.95
    """With `gae`: 1 trusts returns, 0 the critic."""
    critic_learning_rate: NonNegativeFloat = 1e-3
    """With `gae`: Adam's learning rate for the critic."""
    critic_steps: PositiveInt = 8
    """With `gae`: steps of the critic per rollout."""
    critic_batch_size: PositiveInt = 256
    """With `gae`: episodes per step of the critic."""
    optimizer: Optimizer = "natural"
    """`natural` (steps that add up to `target_kl`), `adam` (at `learning_rate`) or `adaptive_adam`."""
    step: Step = "adaptive"
    """`adaptive` (at most `target_kl`, and small until rewards confirm the steps so far) or `fixed` (`target_kl`)."""
    target_kl: PositiveFloat = 2.0
    """Sum of the sizes of an update's steps in nats per noise; with `adaptive`, the largest sum."""
    kl_stop: PositiveFloat = 1.5
    """An update stops once it has moved beyond this times its size."""
    damping: NonNegativeFloat = 0.01
    """Damping of the Fisher matrix."""
    cg_iterations: PositiveInt = 4
    """Conjugate-gradient iterations per natural step."""
    fisher_episodes: PositiveInt = 64
    """Episodes that the Fisher matrix and the KL are measured on; a step costs about 15 passes over them."""
    learning_rate: NonNegativeFloat = 2e-4
    """Adam's learning rate."""
    max_grad_norm: PositiveFloat = 1.0
    """Adam's gradients are clipped to this norm."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the reference (the policy at the start), in standard deviations of reward per nat."""
    kl_prior_coef: NonNegativeFloat = 0.0
    """Weight of the KL to N(0, I), in the same unit."""
    entropy_coef: Float = 0.0
    """Weight of the entropy of the whole noise, in the same unit; matters only if the log-variance is learned."""
    micro_batches: PositiveInt = 1
    """Parts that gradients and Fisher products are computed in, one after the other: less memory, the same result."""
    precision: Precision = "float32"
    """Of the policy: `float32`, or `bfloat16` (autocast over float32 weights; densities stay float32)."""
    compile: bool = False
    """Compile the policy (torch.compile). The first update takes longer, and results differ by rounding."""
    seed: Seed = 0
    """Seed of initialisation, prompts and noise."""
    save_every: PositiveInt = 20
    """Updates between checkpoints."""
    keep_checkpoints: NonNegativeInt = 0
    """Newest checkpoints to keep, besides the best; 0 keeps all."""
    resume: bool = False
    """Resume from the newest checkpoint in the run folder."""
    wandb: bool = False
    """Also log to Weights & Biases."""

    def __post_init__(self) -> None:
        check_config(self)


def train(config: PPOConfig) -> NoiseARPolicy:
    """Improves a policy and returns it in eval mode; see the module's docstring.

    Raises:
        ValueError: If an option is out of range, or no episode of an update has a finite reward.
        FileExistsError: If the run folder holds a run and ``resume`` is false.
    """
    check_groups(config.advantage, config.samples_per_prompt)
    run = Run(config.output_dir, config, resume=config.resume, wandb=config.wandb)

    # Environment: this process's episodes of an update in one batch.
    batch = config.prompts_per_update * config.samples_per_prompt
    mine = shard(batch, "episodes per update")
    options: dict[str, Any] = {"denoiser": config.denoiser} | config.denoiser_options
    options |= {"prompts": config.prompts, "reward": config.reward, "reward_device": config.reward_device}
    options["text_encoder"] = text_encoder_of(config.init_from, config.policy)
    envs = make_vector_env(config.env_id, len(mine.rows), **options)
    task = envs.task
    n_prompts = min(config.prompts_per_update, len(task.prompts))
    groups = torch.arange(batch, device=run.device) % n_prompts  # (B,) of all processes

    # Policy in eval mode, so that the density it samples from is the density it is scored by.
    torch.manual_seed(config.seed)
    policy = initial_policy(config.init_from, config.policy, task.policy_sizes, str(task)).to(run.device)
    fit_text(policy, task.reader, task.prompts, config.seed)
    same_everywhere(policy)
    policy.compute_in(config.precision, config.compile)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = PolicyOptimizer(
        policy,
        config.optimizer,
        target_kl=config.target_kl / (config.epochs * config.minibatches),
        learning_rate=config.learning_rate,
        damping=config.damping,
        cg_iterations=config.cg_iterations,
        fisher_episodes=config.fisher_episodes,
        micro_batches=config.micro_batches,
        max_grad_norm=config.max_grad_norm,
    )
    step_size = StepSize(config.step, config.target_kl)
    low, high = config.clip_range, config.clip_range if config.clip_high is None else config.clip_high
    critic = NoiseARCritic(policy.config).to(run.device).eval() if config.advantage == "gae" else None
    if critic is not None:
        critic.policy.compute_in(config.precision, config.compile)
        fit_text(critic.policy, task.reader, task.prompts, config.seed)
        same_everywhere(critic)

    # What a checkpoint holds besides the policy.
    parts: dict[str, Any] = {"optimizer": optimizer, "step_size": step_size}
    if task.reward.normalize == "running":  # otherwise it has no state
        parts |= {"reward": task.reward}
    if critic is not None:
        critic_optimizer = torch.optim.Adam(critic.parameters(), lr=config.critic_learning_rate, fused=True)
        parts |= {"critic": critic, "critic_optimizer": critic_optimizer}
    counters = run.load(policy, **parts) if config.resume else Counters()
    guard = Guard(policy, counters, optimizer, config.kl_stop * config.target_kl)
    watch = CollapseWatch(task.reward)
    began = time.time() - counters.seconds

    left = range(counters.step, config.updates)
    bar = tqdm(left, initial=counters.step, total=config.updates, desc="ppo", disable=not is_main())
    for update in bar:
        chosen = next_prompts(task.prompts, n_prompts, update, config.seed)
        prompts = [chosen[group] for group in groups[mine.rows].tolist()]

        # Rollout: the environment is deterministic up to the end, so all patches are drawn ahead of it.
        rng = stream_rng(config.seed, Stream.ROLLOUT, update)
        seeds = rng.integers(2**62, size=batch)[mine.rows]
        begun = envs.begin([int(s) % 2**31 for s in seeds], prompts)
        text, mask = (x.to(run.device) for x in begun)  # (M, L, D), (M, L)
        outcome = envs.play(policy.sample(text, mask, seeds=seeds.tolist()).patches)
        patches = outcome.patches  # (M, N, A), clipped as the environment did
        reward = mine.gather(outcome.rewards.to(run.device))  # (B,) of all processes
        kept = finite_episodes(reward, groups)  # (K,): the others are dropped and counted
        own = among(kept, mine.rows)  # those of this process
        patches, text, mask = (x[own.rows] for x in (patches, text, mask))  # (k, …)
        reward, group, count = reward[kept], groups[kept], len(kept)  # (K,)

        # The policy that sampled. Scored in the parts and by the pass of the update, so that the first ratio is exactly
        # 1 in any precision; the KL is measured in float32.
        scored = own.local().split(config.minibatches * config.micro_batches)
        every = [policy.log_prob(*(x[part.rows] for x in (patches, text, mask))).detach() for part in scored]
        old_log_prob = torch.cat(every)[: len(patches)]  # (k, N), without stand-ins
        old, start = (p.exact_distribution(patches, text, mask) for p in (policy, reference))

        # Advantages, in standard deviations of this update's.
        if config.advantage == "gae":
            assert critic is not None
            with torch.no_grad():
                if counters.step == 0:  # a critic of 0 would make every first advantage the reward itself
                    critic.value.bias.fill_(reward.mean())
                values = own.gather(critic(patches, text, mask))  # (K, N)
            advantages, returns = generalized_advantages(reward, values, config.gae_lambda)
        else:
            per_episode = group_advantages(reward, group, config.advantage, counters.reward_ema)
            advantages = per_episode[:, None].expand(-1, task.n_patches)
        advantages = own.take(standardized(advantages, reward))  # (k, N)
        counters.average_reward(reward.mean().item(), config.ema_decay)

        # How far this update may go.
        agreed = agreement(old, start, patches, advantages)
        update_kl = step_size.next(agreed)

        # Policy: epochs of minibatches, until the update is as long as it may be.
        guard.remember()
        metrics, approx_kl = [], 0.0  # means of ratio - 1, loss, share of clipped patches
        longest = config.kl_stop * update_kl
        for _ in range(config.epochs):
            order = rng.permutation(count) if config.minibatches > 1 else np.arange(count)
            for rows in np.array_split(order, min(config.minibatches, count)):
                minibatch, sums = among(rows, own.places), torch.zeros(3, device=run.device)
                policy.zero_grad(set_to_none=True)
                for part in minibatch.split(config.micro_batches):
                    b_patches, b_text, b_mask = (x[part.rows] for x in (patches, text, mask))
                    distribution = policy.distribution(b_patches, b_text, b_mask)
                    log_prob = distribution.log_prob(b_patches)  # (b, N)
                    policy_loss = ppo_loss(log_prob, old_log_prob[part.rows], advantages[part.rows], low, high)
                    loss = policy_loss + config.kl_prior_coef * kl_to_gaussian(distribution).sum(1).mean()
                    loss = loss - config.entropy_coef * distribution.entropy().sum(1).mean()
                    if config.kl_coef:
                        frozen = reference.distribution(b_patches, b_text, b_mask)
                        loss = loss + config.kl_coef * kl_divergence(distribution, frozen).sum(1).mean()
                    (part.weight * loss).backward()
                    change = (log_prob.detach() - old_log_prob[part.rows]).exp() - 1
                    beyond = ((change < -low) | (change > high)).float()
                    sums += part.weight * torch.stack([change.mean(), policy_loss.detach(), beyond.mean()])
                sum_gradients(policy)
                b_patches, b_text, b_mask = (x[minibatch.rows] for x in (patches, text, mask))
                b_old, size = rows_of(old, minibatch.rows), update_kl / config.target_kl
                approx_kl = optimizer.step(b_patches, b_text, b_mask, b_old, size, minibatch)
                metrics.append(all_sum(sums).tolist())
                if not approx_kl <= longest:
                    break
            if not approx_kl <= longest:
                break
        approx_kl = guard.settle(approx_kl)  # 0 if the update blew up: it is undone and counted

        # Critic: its own network, its own optimiser.
        record = guard.record
        if critic is not None:
            for _ in range(config.critic_steps):
                part = among(rng.permutation(count)[: config.critic_batch_size], own.places)
                expected = critic(*(x[part.rows] for x in (patches, text, mask)))
                value_loss = 0.5 * (expected - own.take(returns)[part.rows]).square().mean()
                critic_optimizer.zero_grad(set_to_none=True)
                (part.weight * value_loss).backward()
                sum_gradients(critic)
                if finite_gradients(critic):
                    critic_optimizer.step()
            spread = (reward[:, None] - values).var() / reward.var().clamp(min=1e-12)
            record |= {
                "losses/value_loss": part.mean(value_loss).item(),
                "losses/explained_variance": 1 - spread.item(),
            }

        # Records and checkpoints.
        counters.step, counters.images = update + 1, counters.images + batch
        counters.seconds = time.time() - began
        record |= {
            "charts/episodic_return": reward.mean().item(),
            "charts/dropped_episodes": batch - count,
            "charts/images": counters.images,
            "charts/SPS": counters.images * task.n_patches / counters.seconds,
            "losses/policy_loss": float(np.mean([loss for _, loss, _ in metrics])),
            "losses/entropy": own.mean(old.entropy().sum(1).mean()).item(),
            "losses/approx_kl": approx_kl,
            "losses/clipfrac": float(np.mean([clipped for *_, clipped in metrics])),
            "losses/first_ratio": 1 + metrics[0][0],
            "policy/step_kl": update_kl,
            "policy/mean_abs": own.mean(old.base_dist.mean.abs().mean()).item(),
            "policy/std": own.mean(old.base_dist.stddev.mean()).item(),
            "policy/kl_to_gaussian": own.mean(kl_to_gaussian(old).sum(1).mean()).item(),
        }
        if agreed is not None:
            record["policy/agreement"] = agreed
        if config.optimizer != "natural":
            record["charts/learning_rate"] = optimizer.learning_rate
        if counters.step % config.save_every == 0:  # a diagnostic: 1 if a step on one prompt moves all alike
            every = [own.gather(x) for x in (patches, text, mask)]
            talk = cross_talk(policy, every[0], every[1], every[2], reward - reward.mean(), group)
            record |= {"policy/cross_talk": talk} if np.isfinite(talk) else {}
        scores = {key: mine.gather(values) for key, values in outcome.scores.items()}
        record |= {key: float(np.mean(values.cpu()[kept.cpu()].numpy())) for key, values in scores.items()}
        watch.look(record, own.gather(advantages))
        run.log(record, counters.step)
        bar.set_postfix(reward=f"{record['charts/episodic_return']:.3f}", kl=f"{record['policy/kl_to_gaussian']:.1f}")
        if counters.step % config.save_every == 0 or counters.step == config.updates or run.stopping:
            run.save(policy, counters, **parts)
    envs.close()
    run.close()
    return policy


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(PPOConfig, argv, __doc__)
    train(config)
    if is_main():
        print(f"policy: {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
