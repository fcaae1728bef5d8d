r"""Trains a critic of noises on rollouts: which noise suits a prompt, without an image (Q(prompt, noise)).

    loss = huber((Q(c, x) - r) / std(r)) + thumbnail_weight · mean (thumbnail(c, x) - pixels)²

``x`` is the noise of a rollout, ``r`` its reward and *pixels* its image in coarse cells, if ``noisear collect
--save-images`` kept it: a reward alone is one number per image, and a network that sees nothing else learns noises by
heart. All rollouts of some prompts are held out; what counts is the order of a prompt's noises *within* a folder, since
to tell a policy's noise from Gaussian noise is easy: the rank correlation, and the reward of the noise that the critic
would choose, as a share of the way from their mean to their best. The weights that choose best are kept. Many prompts
with few noises each teach more than the reverse.

Several processes share the rollouts of a batch (:mod:`noisear_rl.distributed`); their number changes no result.

    noisear collect --env-id NoiseAR-ShapesTurbo-v0 --prompts train --num-prompts 9999 --samples-per-prompt 6 \
        --save-images --output-dir runs/seen
    noisear critic --rollouts runs/seen --output-dir runs/critic
    noisear evaluate --denoiser shapes-turbo --critic runs/critic --methods critic-16 best-of-16

Shapes: ``R`` rollouts of all folders, ``b`` rollouts of a batch in this process.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from noisear_rl.command import run_script
from noisear_rl.config import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    check_config,
    parse_config,
)
from noisear_rl.data.rollouts import load_seen
from noisear_rl.denoisers import DenoiserOptions, load_denoiser
from noisear_rl.distributed import all_sum, is_main, process, same_everywhere, shard, sum_gradients
from noisear_rl.evaluation.ranking import choice_gain, rank_correlation
from noisear_rl.learning.guards import Guard
from noisear_rl.learning.run import Counters, Run, split_by_prompt
from noisear_rl.policy import Precision
from noisear_rl.policy.layers import autocast
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.samplers.noise_critic import NoiseCritic, NoiseCriticConfig, load_critic, thumbnails
from noisear_rl.seeds import Stream, stream_rng

VALIDATION_BATCH = 1024  # held-out rollouts per forward pass


@dataclass
class CriticConfig:
    """Options of training."""

    rollouts: tuple[Path, ...] = (Path("runs/rollouts"),)
    """Folders that `noisear collect` wrote, of one denoiser and one reward."""
    init_from: str | None = None
    """Checkpoint, run folder or Hub id of a critic to start from; unset for a fresh one."""
    output_dir: Path = Path("runs/critic")
    """Run folder."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Overrides for the denoiser of the rollouts, such as `dtype float32` or `path FOLDER`; only its text is read."""
    critic: NoiseCriticConfig = field(default_factory=NoiseCriticConfig)
    """Sizes of a fresh critic; those of the noise and the text always come from the denoiser."""
    thumbnail_weight: NonNegativeFloat = 4.0
    """Weight of the squared error of thumbnails, if the rollouts have images."""
    epochs: PositiveInt = 6
    """Passes over the rollouts."""
    batch_size: PositiveInt = 256
    """Rollouts per update."""
    learning_rate: NonNegativeFloat = 2e-3
    """AdamW's highest learning rate: a tenth of the updates warms up, a cosine cools down."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    held_out_share: Share = 0.05
    """Share of the prompts whose rollouts are only validated on."""
    evaluate_every: PositiveInt = 200
    """Updates between validations."""
    micro_batches: PositiveInt = 1
    """Parts that gradients are computed in, one after the other: less memory, the same result."""
    precision: Precision = "float32"
    """Of the network: `float32`, or `bfloat16` (autocast over float32 weights)."""
    seed: Seed = 0
    """Training seed: initialisation, order and dropout."""
    save_every: PositiveInt = 500
    """Updates between checkpoints."""
    keep_checkpoints: NonNegativeInt = 0
    """Newest checkpoints to keep, besides the best; 0 keeps all."""
    resume: bool = False
    """Resume from the newest checkpoint in the run folder."""
    wandb: bool = False
    """Also log to Weights & Biases."""

    def __post_init__(self) -> None:
        check_config(self)


def train(config: CriticConfig) -> NoiseCritic:
    """Trains a critic and returns it in eval mode; see the module docstring.

    Raises:
        FileNotFoundError: If a folder contains no rollouts, or ``init_from`` no critic.
        ValueError: If the folders differ in denoiser or reward, the critic was made for another denoiser, or there are
            too few prompts to hold some out.
    """
    run = Run(config.output_dir, config, resume=config.resume, wandb=config.wandb)

    # Data, and the text of its prompts.
    seen = load_seen(config.rollouts)
    denoiser = load_denoiser(seen.denoiser, **config.denoiser_options)
    reader = PromptReader(config.critic.text_encoder, denoiser)
    text, mask = (x.to(run.device) for x in reader.read_prompts(seen.prompts))  # (P, L, D), (P, L)
    names = [seen.prompts[i] for i in seen.prompt]
    train_rows, held_out_rows = split_by_prompt(names, config.held_out_share, config.seed)

    # Network; at first it is also the best so far.
    torch.manual_seed(config.seed)
    sizes: dict[str, Any] = {"latent_shape": tuple(denoiser.latent_shape), **reader.sizes}
    fresh = dataclasses.replace(config.critic, **sizes)
    critic = (load_critic(config.init_from) if config.init_from else NoiseCritic(fresh)).to(run.device)
    critic.check_denoiser(denoiser, reader)
    same_everywhere(critic)
    if not config.init_from:
        critic.mean.fill_(float(seen.rewards[train_rows].mean()))
        critic.std.fill_(max(float(seen.rewards[train_rows].std()), 1e-6))
    best = copy.deepcopy(critic)
    reduce = partial(thumbnails, config=critic.config)
    pixels = seen.thumbnails(reduce) if config.thumbnail_weight else None  # (R, 12, *cells), 8 bits
    weight = config.thumbnail_weight if pixels is not None else 0.0
    optimizer = torch.optim.AdamW(
        critic.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    updates_per_epoch = max(1, len(train_rows) // config.batch_size)
    updates = config.epochs * updates_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=updates + 1, pct_start=0.1
    )
    parts = {"optimizer": optimizer, "schedule": schedule, "best": best}
    counters = run.load(critic, **parts) if config.resume else Counters()
    guard = Guard(critic, counters)
    began = time.time() - counters.seconds

    def predict(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards ``(b,)`` and thumbnails of rollouts."""
        noise = torch.from_numpy(seen.noise[rows]).float().to(run.device)
        at = torch.from_numpy(seen.prompt[rows]).to(run.device)
        with autocast(noise.device, config.precision == "bfloat16"):
            reward, thumbnail = critic(noise, text[at], mask[at])
        return reward.float(), thumbnail.float()

    @torch.no_grad()
    def validate() -> dict[str, float]:
        """How well the critic orders the held-out noises of each prompt."""
        critic.eval()
        own = shard(len(held_out_rows))
        chunks = np.array_split(held_out_rows[own.rows], -(-len(own.rows) // VALIDATION_BATCH))
        predicted = own.gather(torch.cat([predict(rows)[0] for rows in chunks])).cpu().numpy()
        rewards, group = seen.rewards[held_out_rows], seen.group[held_out_rows]
        return {
            "losses/error_held_out": float(np.abs(predicted - rewards).mean()),
            "eval/rank_correlation": rank_correlation(predicted, rewards, group),
            "eval/choice_gain": choice_gain(predicted, rewards, group),
        }

    left = range(counters.step, updates)
    bar = tqdm(left, initial=counters.step, total=updates, desc="critic", unit="update", disable=not is_main())
    for update in bar:
        # Every epoch has its own order; an update and its dropout depend only on (seed, update).
        epoch, index = divmod(update, updates_per_epoch)
        order = stream_rng(config.seed, Stream.BATCH_ORDER, epoch).permutation(train_rows)
        rows = order[index * config.batch_size : (index + 1) * config.batch_size]

        # Loss and step.
        critic.train()
        masks = int(stream_rng(config.seed, Stream.DROPOUT, update).integers(2**31))
        torch.manual_seed(masks + process().process_index)
        sums = torch.zeros(2, device=run.device)
        optimizer.zero_grad(set_to_none=True)
        for part in shard(len(rows)).split(config.micro_batches):
            own = rows[part.rows]
            predicted, thumbnail = predict(own)
            reward = torch.from_numpy(seen.rewards[own]).to(run.device)
            error = F.huber_loss(predicted / critic.std, reward / critic.std)
            blur = error.new_zeros(())
            if pixels is not None:
                blur = F.mse_loss(thumbnail, torch.from_numpy(pixels[own]).float().to(run.device) / 255)
            (part.weight * (error + weight * blur)).backward()
            sums += part.weight * torch.stack([error.detach(), blur.detach()])
        sum_gradients(critic)
        sums = all_sum(sums)
        norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), config.max_grad_norm)
        if guard.accepts(sums, norm):  # otherwise this update is skipped and counted
            optimizer.step()
        schedule.step()

        # Records, the best so far and checkpoints.
        counters.step, counters.seconds = update + 1, time.time() - began
        if counters.step % config.evaluate_every == 0 or counters.step == updates:
            record = {"losses/huber": sums[0].item(), "losses/thumbnail": sums[1].item()} | validate() | guard.record
            record["charts/learning_rate"] = float(schedule.get_last_lr()[0])
            if counters.best is None or record["eval/choice_gain"] > counters.best:
                counters.best = record["eval/choice_gain"]
                best.load_state_dict(critic.state_dict())
            run.log(record, counters.step)
            bar.set_postfix(rank=f"{record['eval/rank_correlation']:.3f}", gain=f"{record['eval/choice_gain']:.3f}")
        if (counters.step % config.save_every == 0 or run.stopping) and counters.step < updates:
            run.save(critic, counters, **parts)
    critic.load_state_dict(best.state_dict())
    run.save(critic, counters, **parts)
    run.close()
    return critic.eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(CriticConfig, argv, __doc__)
    train(config)
    if is_main():
        print(f"critic: {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
