"""Trajectory balance over noise patches: the policy becomes the prior, tilted by the exponential of the reward.

    L = ½ E[ ( log π(x | text) - log p(x | text) - r / β + log Z(text) )² ],   log Z = mean of r / β - log π + log p

The only minimum is ``π = p · exp(r / β) / Z``, with ``p`` N(0, I) or the policy at the start, wherever episodes come
from (outsourced diffusion sampling, Venkatraman et al. 2025, arXiv 2502.06999). So a batch may hold fresh episodes,
those of earlier updates, and rollouts on disk. ``log Z`` of a prompt is the mean over its episodes in the batch, which
makes the loss a variance and needs no network (VarGrad, Richter et al. 2020, arXiv 2010.10436). Natural steps are the
Gauss-Newton steps of this loss, as long as the batch confirms them: they shrink near its minimum.

A policy with layouts changes its density by tens of nats where a noise chooses another layout than before. Such noises
dominate the loss if they are replayed or ``p`` is the policy at the start: use N(0, I) and fresh episodes there.

    noisear trajectory-balance --config shapes/trajectory_balance --init-from shapes/nll

Several processes share the episodes of an update (``noisear_rl/distributed.py``); their number changes no result.

Shapes: ``B`` fresh episodes of an update, ``M`` of them in this process; ``K`` with a finite reward, ``k`` of them in
this process; ``n`` with the replayed ones, ``m`` of them in this process; ``b`` of a micro-batch; ``N`` patches, ``A``
elements per patch, ``L`` text tokens, ``D`` text width.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

import noisear_rl  # noqa: F401  (registers the environments)
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
from noisear_rl.data.rollouts import check_same_task, load_rollouts
from noisear_rl.denoisers import DenoiserOptions
from noisear_rl.distributed import Part, all_sum, among, is_main, same_everywhere, shard, sum_gradients
from noisear_rl.envs import EnvId, make_vector_env
from noisear_rl.gaussian import gaussian_log_prob, kl_to_gaussian, rows_of
from noisear_rl.learning.guards import CollapseWatch, Guard
from noisear_rl.learning.losses import finite_episodes, trajectory_balance_loss
from noisear_rl.learning.natural_gradient import Optimizer, PolicyOptimizer
from noisear_rl.learning.replay import Episodes, Replay
from noisear_rl.learning.run import Counters, Run, next_prompts
from noisear_rl.learning.step_size import Step, StepSize, agreement
from noisear_rl.learning.text_pathway import cross_talk, fit_text
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, Precision, initial_policy, text_encoder_of
from noisear_rl.rewards import RewardSpec
from noisear_rl.seeds import Stream, stream_rng


@dataclass
class TrajectoryBalanceConfig:
    """Options of trajectory balance."""

    env_id: EnvId = "NoiseAR-Shapes-v0"
    """Gymnasium id."""
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
    policy: NoiseARConfig = field(default_factory=lambda: NoiseARConfig(log_variance="shared"))
    """A fresh policy, in the environment's sizes. Its log-variance is learned, since the optimum may have another."""
    output_dir: Path = Path("runs/trajectory-balance")
    """Run folder."""
    beta: PositiveFloat = 0.05
    """Temperature of the tilt, in reward per nat: the smaller, the farther the optimum is from `p`."""
    prior: Literal["gaussian", "initial"] = "gaussian"
    """What is tilted, `p`: `gaussian` (N(0, I)) or `initial` (the policy at the start)."""
    updates: PositiveInt = 100
    """Batches of fresh episodes, each followed by `steps`."""
    prompts_per_update: PositiveInt = 4
    """Prompts of fresh episodes per update, cycled in shuffled order."""
    samples_per_prompt: PositiveInt = 64
    """Noises per prompt and update, at least 2. `target_kl` should be about proportional to it."""
    replayed_prompts: NonNegativeInt = 4
    """Prompts of replayed episodes per update, up to `samples_per_prompt` of each; 0 for no replay."""
    replay_updates: NonNegativeInt = 8
    """Newest updates whose episodes are replayed; checkpoints hold these episodes."""
    rollouts: Path | None = None
    """Folder that `algos/collect.py` wrote, to replay too; of the same denoiser and reward."""
    steps: PositiveInt = 2
    """Steps per update."""
    optimizer: Optimizer = "natural"
    """`natural` (steps that add up to `target_kl` at most), `adam` (at `learning_rate`) or `adaptive_adam`."""
    step: Step = "adaptive"
    """`adaptive` (at most `target_kl`, and small until rewards confirm the steps so far) or `fixed` (`target_kl`)."""
    target_kl: PositiveFloat = 2.0
    """Largest sum of the sizes of an update's steps in nats per noise."""
    kl_stop: PositiveFloat = 1.5
    """An update stops once it has moved beyond this times its size."""
    damping: NonNegativeFloat = 0.01
    """Damping of the Fisher matrix."""
    cg_iterations: PositiveInt = 8
    """Conjugate-gradient iterations per natural step."""
    fisher_episodes: PositiveInt = 128
    """Episodes that the Fisher matrix and the KL are measured on; a step costs about 25 passes over them."""
    learning_rate: NonNegativeFloat = 2e-4
    """Adam's learning rate."""
    max_grad_norm: PositiveFloat = 1.0
    """Adam's gradients are clipped to this norm."""
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


def train(config: TrajectoryBalanceConfig) -> NoiseARPolicy:
    """Trains a policy and returns it in eval mode; see the module's docstring.

    Raises:
        ValueError: If an option is out of range, the rollouts are of another denoiser or reward, the reward uses
            running statistics, or no episode of an update has a finite reward.
        FileNotFoundError: If there are no rollouts.
        FileExistsError: If the run folder holds a run and ``resume`` is false.
    """
    if config.samples_per_prompt < 2:
        raise ValueError("samples_per_prompt must be at least 2, not 1: log Z of a prompt is a mean over its episodes")
    if config.rollouts is not None and not config.replayed_prompts:
        raise ValueError(f"rollouts {config.rollouts} are given, but replayed_prompts is 0: set it to replay them")
    rollouts = None if config.rollouts is None else load_rollouts(config.rollouts)
    run = Run(config.output_dir, config, resume=config.resume, wandb=config.wandb)

    # Environment: this process's episodes of an update in one batch.
    batch = config.prompts_per_update * config.samples_per_prompt
    mine = shard(batch, "episodes per update")
    options = {"prompts": config.prompts, "reward": config.reward, "reward_device": config.reward_device}
    options |= config.denoiser_options
    options["text_encoder"] = text_encoder_of(config.init_from, config.policy)
    envs = make_vector_env(config.env_id, len(mine.rows), **options)
    task = envs.task
    if task.reward.normalize == "running":
        raise ValueError("running statistics would move the optimum of trajectory balance: use normalize: fixed")
    on_disk = None
    if rollouts is not None:
        check_same_task(rollouts, task, str(config.rollouts))
        on_disk = Episodes(rollouts.prompts, rollouts.patches(), torch.from_numpy(rollouts.rewards))
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
        target_kl=config.target_kl / config.steps,
        learning_rate=config.learning_rate,
        damping=config.damping,
        cg_iterations=config.cg_iterations,
        fisher_episodes=config.fisher_episodes,
        micro_batches=config.micro_batches,
        max_grad_norm=config.max_grad_norm,
    )
    step_size = StepSize(config.step, config.target_kl)
    replay = Replay(config.replay_updates, on_disk)
    parts: dict[str, Any] = {"optimizer": optimizer, "step_size": step_size, "replay": replay}
    counters = run.load(policy, **parts) if config.resume else Counters()
    guard = Guard(policy, counters, optimizer, config.kl_stop * config.target_kl)
    watch = CollapseWatch(task.reward)
    began = time.time() - counters.seconds

    left = range(counters.step, config.updates)
    bar = tqdm(left, initial=counters.step, total=config.updates, desc="trajectory balance", disable=not is_main())
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
        reward, group = reward[kept], groups[kept]  # (K,)

        # Batch: these episodes, then replayed ones.
        names = [chosen[i] for i in group.tolist()]  # (K,)
        again = replay.draw(rng, config.replayed_prompts, config.samples_per_prompt)
        replay.add(names, own.gather(patches), reward)
        part, inputs, rewards = own.local(), [patches, text, mask], reward
        if again is not None:
            more = shard(len(again.prompts))
            read = task.reader.read_prompts([again.prompts[row] for row in more.rows])
            added = (again.patches[more.rows].float(), *read)
            part, rewards = part.followed_by(more), torch.cat([reward, again.rewards.to(reward)])
            inputs = [torch.cat([x, y.to(x)])[part.rows] for x, y in zip(inputs, added, strict=True)]
            names, part = names + again.prompts, part.local()
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(names))}
        prompt = part.take(torch.tensor([numbers[name] for name in names], device=run.device))  # (m,)
        scaled = part.take(rewards) / config.beta  # (m,) in nats

        # The policy that sampled, and the prior.
        old, start = (p.exact_distribution(*inputs) for p in (policy, reference))
        noise = inputs[0]  # (m, N, A)
        prior = gaussian_log_prob(noise) if config.prior == "gaussian" else start.log_prob(noise)  # (m, N)
        gain = scaled - (old.log_prob(noise) - prior).sum(1)  # (m,) rewards, less what they cost, in nats
        log_z = mean_by_prompt(gain, prompt, part)

        # How far this update may go: do the gains of fresh episodes rise on the way so far?
        fresh = np.arange(len(own.rows))
        patches, text, mask = (x[fresh] for x in inputs)  # (k, …)
        old, start = (rows_of(distribution, fresh) for distribution in (old, start))
        advantages = own.gather(gain - log_z)  # (K,)
        agreed = agreement(old, start, patches, own.take(advantages))
        update_kl = step_size.next(agreed)

        # Policy: steps on the whole batch, until the update is as long as it may be.
        guard.remember()
        losses, approx_kl, longest = [], 0.0, config.kl_stop * update_kl
        data = (inputs, prior, scaled, prompt, part, config.micro_batches)
        for _ in range(config.steps):
            log_z, _ = balance(policy, *data)
            policy.zero_grad(set_to_none=True)
            total = torch.zeros((), device=run.device)
            for piece in part.split(config.micro_batches):
                log_prob = policy.log_prob(*(x[piece.rows] for x in inputs))  # (b, N)
                log_ratio = log_prob - prior[piece.rows]
                loss = piece.weight * trajectory_balance_loss(log_ratio, scaled[piece.rows], log_z[piece.rows])
                loss.backward()
                total += loss.detach()
            sum_gradients(policy)
            size = update_kl / config.target_kl
            approx_kl = optimizer.step(patches, text, mask, old, size, own, partial(loss_of, policy, *data))
            losses.append(all_sum(total).item())
            if not approx_kl <= longest:
                break
        approx_kl = guard.settle(approx_kl)  # 0 if the update blew up: it is undone and counted

        # Records and checkpoints.
        counters.step, counters.images = update + 1, counters.images + batch
        counters.seconds = time.time() - began
        record = {
            "charts/episodic_return": reward.mean().item(),
            "charts/dropped_episodes": batch - len(kept),
            "charts/replayed_episodes": part.total - len(kept),
            "charts/images": counters.images,
            "charts/SPS": counters.images * task.n_patches / counters.seconds,
            "losses/policy_loss": float(np.mean(losses)),
            "losses/first_loss": losses[0],
            "losses/log_z": own.mean(log_z[fresh].mean()).item(),
            "losses/entropy": own.mean(old.entropy().sum(1).mean()).item(),
            "losses/approx_kl": approx_kl,
            "policy/step_kl": update_kl,
            "policy/mean_abs": own.mean(old.base_dist.mean.abs().mean()).item(),
            "policy/std": own.mean(old.base_dist.stddev.mean()).item(),
            "policy/kl_to_gaussian": own.mean(kl_to_gaussian(old).sum(1).mean()).item(),
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
        watch.look(record, advantages)
        run.log(record, counters.step)
        bar.set_postfix(reward=f"{record['charts/episodic_return']:.3f}", kl=f"{record['policy/kl_to_gaussian']:.1f}")
        if counters.step % config.save_every == 0 or counters.step == config.updates or run.stopping:
            run.save(policy, counters, **parts)
    envs.close()
    run.close()
    return policy


def mean_by_prompt(values: torch.Tensor, prompt: torch.Tensor, part: Part) -> torch.Tensor:
    """The mean over a prompt's episodes of all processes, ``(m,)``, from values ``(m,)`` and numbers of prompts."""
    own, number = values[: len(part.places)], prompt[: len(part.places)]  # without a stand-in
    sums = values.new_zeros(2, part.total).index_add_(1, number, torch.stack([own, torch.ones_like(own)]))
    total, count = all_sum(sums)
    return (total / count.clamp(min=1))[prompt]


@torch.no_grad()
def balance(
    policy: NoiseARPolicy,
    inputs: Sequence[torch.Tensor],
    prior: torch.Tensor,
    scaled: torch.Tensor,
    prompt: torch.Tensor,
    part: Part,
    micro_batches: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``log Z`` of every episode's prompt ``(m,)``, and the loss over all processes, both in float32."""
    pieces = [[x[piece.rows] for x in inputs] for piece in part.split(micro_batches)]
    log_prob = torch.cat([policy.exact_distribution(*piece).log_prob(piece[0]) for piece in pieces])
    log_ratio = log_prob[: len(prior)] - prior  # (m, N), without stand-ins
    log_z = mean_by_prompt(scaled - log_ratio.sum(1), prompt, part)
    return log_z, part.mean(trajectory_balance_loss(log_ratio, scaled, log_z))


def loss_of(policy: NoiseARPolicy, *data: Any) -> float:
    """The loss alone, for the length of a natural step."""
    return balance(policy, *data)[1].item()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(TrajectoryBalanceConfig, argv, __doc__)
    train(config)
    if is_main():
        print(f"policy: {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
