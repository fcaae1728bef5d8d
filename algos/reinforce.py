"""REINFORCE over noise patches: the score-function estimator with a per-prompt baseline.

    ∇J = E[ (R - b) · Σ_i ∇ log π(x_i | x_<i, text) ]        (Williams 1992; NoiseAR, appendix D)

The estimator leaves open how long a step is. Two answers: ``natural`` moves along ``F⁻¹ ∇J`` by a given KL
(nats per noise), so that head, position and text features count by what they do to the noise; ``adam`` is the
usual one, and much less sample-efficient here. Either is as long as rewards confirm it (``learning/step_size.py``),
so that pure noise moves next to nothing.

    noisear reinforce --config shapes/reinforce

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
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import noisear_rl  # noqa: F401  (registers the environments)
from noisear_rl.command import run_script
from noisear_rl.config import (
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
from noisear_rl.gaussian import concatenated, kl_to_gaussian
from noisear_rl.learning.guards import CollapseWatch, Guard
from noisear_rl.learning.losses import (
    Advantage,
    check_groups,
    finite_episodes,
    group_advantages,
    reinforce_loss,
    standardized,
)
from noisear_rl.learning.natural_gradient import Optimizer, PolicyOptimizer
from noisear_rl.learning.run import Counters, Run, next_prompts
from noisear_rl.learning.step_size import Step, StepSize, agreement
from noisear_rl.learning.text_pathway import cross_talk, fit_text
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, Precision, initial_policy, text_encoder_of
from noisear_rl.rewards import RewardSpec
from noisear_rl.seeds import Stream, stream_rng


@dataclass
class ReinforceConfig:
    """Options of REINFORCE."""

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
    output_dir: Path = Path("runs/reinforce")
    """Run folder."""
    updates: PositiveInt = 100
    """Updates of the policy."""
    prompts_per_update: PositiveInt = 4
    """Distinct prompts per update, cycled in shuffled order."""
    samples_per_prompt: PositiveInt = 64
    """Noises per prompt and update. `target_kl` should be about proportional to it."""
    advantage: Advantage = "rloo"
    """Baseline: `none`, `ema`, `rloo` (leave one out) or `grpo` (group mean and standard deviation)."""
    ema_decay: Fraction = 0.9
    """With `ema`: decay of the running mean of rewards, per update."""
    optimizer: Optimizer = "natural"
    """`natural` (a step of `target_kl`), `adam` (at `learning_rate`) or `adaptive_adam` (towards the KL)."""
    step: Step = "adaptive"
    """`adaptive` (at most `target_kl`, and small until rewards confirm the steps so far) or `fixed` (`target_kl`)."""
    target_kl: PositiveFloat = 2.0
    """Size of a step in nats per noise; with `adaptive`, of the largest."""
    damping: NonNegativeFloat = 0.01
    """Damping of the Fisher matrix."""
    cg_iterations: PositiveInt = 4
    """Conjugate-gradient iterations per natural step."""
    fisher_episodes: PositiveInt = 64
    """Episodes that the Fisher matrix is measured on; a step costs about 15 passes over them."""
    learning_rate: NonNegativeFloat = 2e-4
    """Adam's learning rate."""
    max_grad_norm: PositiveFloat = 1.0
    """Adam's gradients are clipped to this norm."""
    kl_prior_coef: NonNegativeFloat = 0.0
    """Weight of the KL to N(0, I), in standard deviations of reward per nat."""
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


def train(config: ReinforceConfig) -> NoiseARPolicy:
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
    reference = copy.deepcopy(policy).requires_grad_(False)  # not compiled
    optimizer = PolicyOptimizer(
        policy,
        config.optimizer,
        target_kl=config.target_kl,
        learning_rate=config.learning_rate,
        damping=config.damping,
        cg_iterations=config.cg_iterations,
        fisher_episodes=config.fisher_episodes,
        micro_batches=config.micro_batches,
        max_grad_norm=config.max_grad_norm,
    )
    step_size = StepSize(config.step, config.target_kl)
    parts: dict[str, Any] = {"optimizer": optimizer, "step_size": step_size}
    if task.reward.normalize == "running":  # otherwise it has no state
        parts |= {"reward": task.reward}
    counters = run.load(policy, **parts) if config.resume else Counters()
    guard, watch = Guard(policy, counters, optimizer, config.target_kl), CollapseWatch(task.reward)
    began = time.time() - counters.seconds

    left = range(counters.step, config.updates)
    bar = tqdm(left, initial=counters.step, total=config.updates, desc="reinforce", disable=not is_main())
    for update in bar:
        chosen = next_prompts(task.prompts, n_prompts, update, config.seed)
        prompts = [chosen[group] for group in groups[mine.rows].tolist()]

        # Rollout: the environment is deterministic up to the end, so all patches are drawn ahead of it.
        seeds = stream_rng(config.seed, Stream.ROLLOUT, update).integers(2**62, size=batch)[mine.rows]
        begun = envs.begin([int(s) % 2**31 for s in seeds], prompts)
        text, mask = (x.to(run.device) for x in begun)  # (M, L, D), (M, L)
        outcome = envs.play(policy.sample(text, mask, seeds=seeds.tolist()).patches)
        patches = outcome.patches  # (M, N, A), clipped as the environment did
        reward = mine.gather(outcome.rewards.to(run.device))  # (B,) of all processes
        kept = finite_episodes(reward, groups)  # (K,): the others are dropped and counted
        own = among(kept, mine.rows)  # those of this process
        patches, text, mask = (x[own.rows] for x in (patches, text, mask))  # (k, …)
        reward, group = reward[kept], groups[kept]  # (K,)

        # Advantages in standard deviations of this update's rewards.
        advantages = group_advantages(reward, group, config.advantage, counters.reward_ema)
        advantages = own.take(standardized(advantages, reward))  # (k,)
        counters.average_reward(reward.mean().item(), config.ema_decay)

        # Gradient.
        policy.zero_grad(set_to_none=True)
        sums, distributions = torch.zeros(2, device=run.device), []
        for part in own.local().split(config.micro_batches):
            distribution = policy.distribution(patches[part.rows], text[part.rows], mask[part.rows])
            log_prob = distribution.log_prob(patches[part.rows])  # (b, N)
            policy_loss = reinforce_loss(log_prob, advantages[part.rows])
            prior = kl_to_gaussian(distribution).sum(1).mean()
            (part.weight * (policy_loss + config.kl_prior_coef * prior)).backward()
            sums += part.weight * torch.stack([policy_loss.detach(), prior.detach()])
            distributions.append(distribution)
        sum_gradients(policy)
        distribution, (policy_loss, kl_to_prior) = concatenated(distributions), all_sum(sums)

        # Step, as long as the evidence allows.
        own_density, start = (p.exact_distribution(patches, text, mask) for p in (policy, reference))
        agreed = agreement(own_density, start, patches, advantages)
        update_kl = step_size.next(agreed)
        kl = guard.step(patches, text, mask, share=update_kl / config.target_kl, part=own)  # undone if it blows up

        # Records and checkpoints.
        counters.step, counters.images = update + 1, counters.images + batch
        counters.seconds = time.time() - began
        gaussian = distribution.base_dist
        record = {
            "charts/episodic_return": reward.mean().item(),
            "charts/dropped_episodes": batch - len(kept),
            "charts/images": counters.images,
            "charts/SPS": counters.images * task.n_patches / counters.seconds,
            "losses/policy_loss": policy_loss.item(),
            "losses/entropy": own.mean(distribution.entropy().sum(1).mean()).item(),
            "losses/approx_kl": kl,
            "policy/step_kl": update_kl,
            "policy/mean_abs": own.mean(gaussian.mean.abs().mean()).item(),
            "policy/std": own.mean(gaussian.stddev.mean()).item(),
            "policy/kl_to_gaussian": kl_to_prior.item(),
        }
        record |= guard.record
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
        bar.set_postfix(reward=f"{record['charts/episodic_return']:.3f}", kl=f"{kl_to_prior.item():.1f}")
        if counters.step % config.save_every == 0 or counters.step == config.updates or run.stopping:
            run.save(policy, counters, **parts)
    envs.close()
    run.close()
    return policy


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(ReinforceConfig, argv, __doc__)
    train(config)
    if is_main():
        print(f"policy: {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
