"""Reward gradients: the pathwise estimator, through a few-step denoiser and a differentiable reward.

    ∇J = E_ε [ ∇_x R(denoise(x), text) · dx/dθ ],   x_i = μ_i(x_<i, text) + σ_i ε_i

An upper anchor for the algorithms that only see rewards: a gradient gives the direction in which to move every
element of the noise, a scalar does not. It needs a differentiable scorer and white-box access to the denoiser, so do
not compare its results with the others'. A KL to N(0, I) limits drift, or ReNO's norm term
``½‖x‖² - (d - 1)·log‖x‖`` (Eyring et al. 2024, arXiv 2406.04312), which keeps the norm near a Gaussian's.

    noisear reward-gradient --config shapes/reward_gradient

Several processes share the images of an update (``noisear_rl/distributed.py``); their number changes no result.

Shapes: ``B`` images of an update, ``M`` of them in this process, ``k`` of these with a finite reward, ``b`` of a
micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from noisear_rl.command import run_script
from noisear_rl.config import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_config,
    parse_config,
)
from noisear_rl.denoisers import DenoiserName, DenoiserOptions, DifferentiableDenoiser, load_denoiser, require
from noisear_rl.distributed import among, is_main, same_everywhere, shard, sum_gradients
from noisear_rl.envs.noise_task import NoiseTask
from noisear_rl.gaussian import kl_to_gaussian
from noisear_rl.learning.guards import CollapseWatch, Guard
from noisear_rl.learning.natural_gradient import Optimizer, PolicyOptimizer
from noisear_rl.learning.run import Counters, Run, next_prompts
from noisear_rl.learning.text_pathway import fit_text
from noisear_rl.patches import per_row
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, Precision, initial_policy, text_encoder_of
from noisear_rl.rewards import RewardSpec
from noisear_rl.samplers.reno import norm_regularizer
from noisear_rl.seeds import Stream, stream_rng


@dataclass
class RewardGradientConfig:
    """Options of training by reward gradients."""

    denoiser: DenoiserName = "shapes-turbo"
    """Denoiser's name or folder; memory grows with its steps."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32` or `path FOLDER`."""
    reward: RewardSpec | None = None
    """Differentiable scorer; unset for the denoiser's default."""
    reward_device: str | None = None
    """Device of the scorers, such as `cuda:1` or `cpu`; unset for the accelerator if there is one."""
    prompts: str | tuple[str, ...] | None = None
    """Prompts, a prompt file, a published set, or a split of `shapes`; unset for the denoiser's default."""
    init_from: str | None = None
    """Checkpoint, run folder, `shapes/NAME` or Hub id to start from; unset for a fresh policy (Gaussian noise)."""
    policy: NoiseARConfig = field(default_factory=lambda: NoiseARConfig(log_variance="fixed"))
    """A fresh policy, in the denoiser's sizes. A learned variance would collapse: one good noise is enough."""
    output_dir: Path = Path("runs/reward-gradient")
    """Run folder."""
    updates: PositiveInt = 500
    """Updates of the policy."""
    prompts_per_update: PositiveInt = 128
    """Prompts per update, cycled in shuffled order."""
    samples_per_prompt: PositiveInt = 1
    """Noises per prompt and update."""
    optimizer: Optimizer = "adam"
    """`adam` (at `learning_rate`), `natural` (steps of `target_kl`) or `adaptive_adam`."""
    learning_rate: NonNegativeFloat = 1e-3
    """Adam's learning rate."""
    target_kl: PositiveFloat = 0.5
    """Size of a natural step in nats per noise."""
    fisher_episodes: PositiveInt = 128
    """Episodes that the Fisher matrix and the KL are measured on."""
    max_grad_norm: PositiveFloat = 1.0
    """Adam's gradients are clipped to this norm."""
    max_noise_gradient: PositiveFloat = 1.0
    """The gradient of each image's reward by its noise is clipped to this norm; it is huge where objects appear or
    vanish."""
    kl_prior_coef: NonNegativeFloat = 0.002
    """Weight of the KL to N(0, I), in reward per nat."""
    norm_coef: NonNegativeFloat = 0.0
    """Weight of ReNO's norm term."""
    micro_batches: PositiveInt = 1
    """Parts that images are denoised and differentiated in, one after the other: less memory, the same result."""
    precision: Precision = "float32"
    """Of the policy: `float32`, or `bfloat16` (autocast over float32 weights; densities stay float32)."""
    compile: bool = False
    """Compile the policy (torch.compile). The first update takes longer, and results differ by rounding."""
    seed: Seed = 0
    """Seed of initialisation, prompts and noise."""
    save_every: PositiveInt = 100
    """Updates between checkpoints."""
    keep_checkpoints: NonNegativeInt = 0
    """Newest checkpoints to keep, besides the best; 0 keeps all."""
    resume: bool = False
    """Resume from the newest checkpoint in the run folder."""
    wandb: bool = False
    """Also log to Weights & Biases."""

    def __post_init__(self) -> None:
        check_config(self)


def train(config: RewardGradientConfig) -> NoiseARPolicy:
    """Improves a policy and returns it in eval mode; see the module's docstring."""
    run = Run(config.output_dir, config, resume=config.resume, wandb=config.wandb)
    denoiser = load_denoiser(config.denoiser, **config.denoiser_options)
    denoiser = require(denoiser, DifferentiableDenoiser, "a gradient of the reward")
    text_encoder = text_encoder_of(config.init_from, config.policy)
    task = NoiseTask(denoiser, config.reward, config.prompts, None, text_encoder, config.reward_device)
    batch = config.prompts_per_update * config.samples_per_prompt
    mine = shard(batch, "images per update")

    torch.manual_seed(config.seed)
    policy = initial_policy(config.init_from, config.policy, task.policy_sizes, str(task)).to(run.device)
    fit_text(policy, task.reader, task.prompts, config.seed)
    same_everywhere(policy)
    policy.compute_in(config.precision, config.compile)
    optimizer = PolicyOptimizer(
        policy,
        config.optimizer,
        target_kl=config.target_kl,
        learning_rate=config.learning_rate,
        fisher_episodes=config.fisher_episodes,
        max_grad_norm=config.max_grad_norm,
    )
    parts: dict[str, Any] = {"optimizer": optimizer}
    if task.reward.normalize == "running":  # otherwise it has no state
        parts |= {"reward": task.reward}
        if config.micro_batches > 1:
            raise ValueError("running statistics need all images at once: set micro_batches to 1")
    counters = run.load(policy, **parts) if config.resume else Counters()
    guard, watch = Guard(policy, counters, optimizer, config.target_kl), CollapseWatch(task.reward)
    began = time.time() - counters.seconds

    left = range(counters.step, config.updates)
    bar = tqdm(left, initial=counters.step, total=config.updates, desc="gradient", disable=not is_main())
    for update in bar:
        chosen = next_prompts(task.prompts, config.prompts_per_update, update, config.seed)
        prompts = [chosen[i % len(chosen)] for i in mine.rows]
        conditioning = task.denoiser.encode(prompts)
        text, mask = (part.to(run.device) for part in task.reader.read(conditioning))
        seeds = stream_rng(config.seed, Stream.ROLLOUT, update).integers(2**62, size=batch)[mine.rows]

        # Gradient of the reward by the noise: the part through the denoiser, which needs no policy.
        sample = policy.sample(text, mask, seeds=seeds.tolist(), differentiable=True)
        noise = policy.noise(sample)  # (M, C, h, w)
        scores: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for rows in np.array_split(np.arange(len(noise)), min(config.micro_batches, len(noise))):
            leaf = noise[rows].detach().requires_grad_()
            images = denoiser.denoise_differentiably(leaf, conditioning[rows.tolist()])
            scores.append(task.reward.score(images.clamp(0, 1), [prompts[i] for i in rows]))  # (b,)
            gradients += torch.autograd.grad(scores[-1].sum(), leaf)
        reward, gradient = mine.gather(torch.cat(scores).detach()), torch.cat(gradients)  # (B,), (M, C, h, w)
        whole = mine.gather(gradient.flatten(1).isfinite().all(1))  # (B,)
        kept = (reward.isfinite() & whole).nonzero()[:, 0]  # the others are dropped and counted
        if not len(kept):
            raise ValueError(
                "no image has a finite reward and gradient: which scorer gives NaN, or is not differentiable?"
            )
        own = among(kept, mine.rows)  # those of this process
        if not own.weight:
            gradient = torch.zeros_like(gradient)  # of a stand-in, which may be NaN
        length = gradient[own.rows].flatten(1).norm(dim=1)  # (k,)
        scale = config.max_noise_gradient / length.clamp(min=config.max_noise_gradient)
        gradient = gradient[own.rows] * per_row(scale, gradient)

        # From the noise to the parameters, through the mean, the variance and every prefix.
        norm = noise.flatten(1).norm(dim=1)
        reno = norm_regularizer(noise).mean()
        distribution = policy.distribution(sample.patches, text, mask)
        kl_to_prior = kl_to_gaussian(distribution).sum(1).mean()
        surrogate = -(gradient * noise[own.rows]).flatten(1).sum(1).mean()
        penalty = config.kl_prior_coef * kl_to_prior + config.norm_coef * reno
        policy.zero_grad(set_to_none=True)
        (own.weight * surrogate + mine.weight * penalty).backward()
        sum_gradients(policy)
        kl = guard.step(sample.patches.detach(), text, mask, part=mine)  # undone if it blows up

        # Records and checkpoints.
        counters.step, counters.images = update + 1, counters.images + batch
        counters.seconds = time.time() - began
        gaussian = distribution.base_dist
        record = {
            "charts/episodic_return": reward[kept].mean().item(),
            "charts/dropped_episodes": batch - len(kept),
            "charts/images": counters.images,
            "charts/SPS": counters.images * task.n_patches / counters.seconds,
            "losses/noise_gradient": own.mean(length.mean()).item(),
            "losses/clipfrac": own.mean((length > config.max_noise_gradient).float().mean()).item(),
            "losses/approx_kl": kl,
            "policy/mean_abs": mine.mean(gaussian.mean.abs().mean()).item(),
            "policy/std": mine.mean(gaussian.stddev.mean()).item(),
            "policy/noise_norm": mine.mean(norm.mean()).item(),
            "policy/kl_to_gaussian": mine.mean(kl_to_prior).item(),
        }
        record |= guard.record
        if config.optimizer != "natural":
            record["charts/learning_rate"] = optimizer.learning_rate
        watch.look(record)
        run.log(record, counters.step)
        bar.set_postfix(reward=f"{record['charts/episodic_return']:.3f}", kl=f"{record['policy/kl_to_gaussian']:.1f}")
        if counters.step % config.save_every == 0 or counters.step == config.updates or run.stopping:
            run.save(policy, counters, **parts)
    run.close()
    return policy


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(RewardGradientConfig, argv, __doc__)
    train(config)
    if is_main():
        print(f"policy: {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
