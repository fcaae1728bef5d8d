"""Trains NPNet on pairs: regression from Gaussian noise to golden noise (Zhou et al. 2024, arXiv 2411.09502).

    loss = mean (npnet(x, text) - x')²

``x`` is the noise of a pair's seed and ``x'`` its target. AdamW with cosine decay. The authors keep a pair only if a
reward prefers the image of its target: ``filter_reward`` of :mod:`noisear_rl.data.pairs`. Pairs of kinds
``signal_leak`` and ``shared_noise`` store the target's mean and the scale of the noise on top of it: ``x`` is then
drawn anew at every update, and ``x' = mean + noise_scale·x``.

Several processes share the pairs of a batch (:mod:`noisear_rl.distributed`); their number changes no result.

The weights with the lowest held-out loss are kept. An untrained network is the identity, so the result is never worse
than unchanged noise on the held-out pairs.

    noisear pairs --config shapes/pairs --filter-reward shapes-match --output-dir runs/golden
    noisear npnet --config shapes/npnet --pairs runs/golden
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from noisear_rl.data.pairs import load_pairs
from noisear_rl.denoisers import Denoiser, DenoiserName, DenoiserOptions, embed_all, load_denoiser
from noisear_rl.distributed import Part, all_sum, is_main, same_everywhere, shard, sum_gradients
from noisear_rl.files import read_manifest
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.guards import Guard
from noisear_rl.learning.run import Counters, Run
from noisear_rl.policy import Precision
from noisear_rl.samplers.npnet import NPNet, NPNetConfig, load_npnet
from noisear_rl.seeds import Stream, stream_rng

VALIDATION_BATCH = 256  # held-out pairs per forward pass


@dataclass
class NPNetTrainingConfig:
    """Options of training."""

    pairs: Path = Path("runs/golden")
    """Folder that `noisear pairs` or `noisear shared-noise` wrote."""
    init_from: str | None = None
    """Checkpoint, run folder, Hub id or `.pth` file of the authors to start from; unset for a fresh network."""
    output_dir: Path = Path("runs/npnet")
    """Run folder."""
    denoiser: DenoiserName = "shapes"
    """Denoiser that the pairs were made for; the network sees its text embeddings."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32` or `path FOLDER`."""
    npnet: NPNetConfig = field(default_factory=NPNetConfig)
    """Sizes of a fresh network; `latent_shape` and `text_shape` always come from the denoiser."""
    epochs: PositiveInt = 30
    """Passes over the pairs."""
    batch_size: PositiveInt = 64
    """Pairs per update."""
    learning_rate: NonNegativeFloat = 1e-4
    """AdamW's learning rate at the start of the cosine decay."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    held_out_share: Share = 0.1
    """Share of the pairs that is held out for validation."""
    held_out_pairs: PositiveInt = 1024
    """Held-out pairs per validation, at most."""
    evaluate_every: PositiveInt = 50
    """Updates between evaluations on held-out pairs."""
    micro_batches: PositiveInt = 1
    """Parts that gradients are computed in, one after the other: less memory, the same result."""
    precision: Precision = "float32"
    """Of the network: `float32`, or `bfloat16` (autocast over float32 weights; densities stay float32)."""
    seed: Seed = 0
    """Training seed: initialisation, order and added noise."""
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


def train(config: NPNetTrainingConfig, denoiser: Denoiser | None = None) -> NPNet:
    """Trains a network and returns it in eval mode; see the module docstring.

    Args:
        config: Options.
        denoiser: Denoiser to use instead of the one named in ``config``.

    Raises:
        FileNotFoundError: If the folder contains no pairs, or ``init_from`` no network.
        ValueError: If the pairs or the network were made for another denoiser, or there are too few pairs.
    """
    run = Run(config.output_dir, config, resume=config.resume, wandb=config.wandb)

    # Data and denoiser, which computes text embeddings once and caches them.
    pairs = load_pairs(config.pairs).with_format("numpy")
    manifest = read_manifest(config.pairs)
    name = denoiser.name if denoiser else config.denoiser
    if manifest["denoiser"] != name:
        raise ValueError(f"{config.pairs} was made for denoiser {manifest['denoiser']!r}, not {name!r}")
    noise_scale = manifest["noise_scale"]  # 0 if a target belongs to the noise of its seed
    denoiser = denoiser or load_denoiser(config.denoiser, **config.denoiser_options)
    prompts, seeds = [str(prompt) for prompt in pairs["prompt"][:]], pairs["seed"][:]
    embed_all(denoiser, prompts)

    # Network; at first it is also the best so far.
    torch.manual_seed(config.seed)
    shape = tuple(denoiser.latent_shape)
    fresh = dataclasses.replace(config.npnet, latent_shape=shape, text_shape=tuple(denoiser.text_shape))
    npnet = (load_npnet(config.init_from) if config.init_from else NPNet(fresh)).to(run.device)
    npnet.check_denoiser(denoiser)
    same_everywhere(npnet)
    npnet.precision = config.precision
    best = copy.deepcopy(npnet)
    held_out = max(1, int(config.held_out_share * len(pairs)))
    train_rows, held_out_rows = np.arange(held_out, len(pairs)), np.arange(held_out)[: config.held_out_pairs]
    if not len(train_rows):
        raise ValueError(f"{len(pairs)} pairs are too few to hold some out: make more, or lower held_out_share")
    optimizer = torch.optim.AdamW(
        npnet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    updates_per_epoch = max(1, len(train_rows) // config.batch_size)
    updates = config.epochs * updates_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    parts = {"optimizer": optimizer, "schedule": schedule, "best": best}
    counters = run.load(npnet, **parts) if config.resume else Counters()
    began = time.time() - counters.seconds

    def draw(rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """The noise of a batch."""
        if noise_scale:
            return torch.from_numpy(rng.standard_normal((len(rows), *shape), dtype=np.float32))
        return standard_noise(seeds[rows], shape)

    def batch(rows: np.ndarray, part: Part, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise, its target and its text embedding, of a part of a batch."""
        own, noise = rows[part.rows], drawn[part.rows]
        target = torch.from_numpy(np.stack(pairs[own]["target"])).float().unflatten(1, shape)
        if noise_scale:
            target = target + noise_scale * noise
        text = denoiser.encode([prompts[row] for row in own]).policy_embeds
        return noise.to(run.device), target.to(run.device), text.to(run.device)

    @torch.no_grad()
    def held_out_losses() -> dict[str, float]:
        rng, sums = stream_rng(config.seed, Stream.HELD_OUT_NOISE), np.zeros(4)
        for rows in np.array_split(held_out_rows, -(-len(held_out_rows) // VALIDATION_BATCH)):
            part = shard(len(rows))
            noise, target, text = batch(rows, part, draw(rows, rng))
            golden = npnet(noise, text)
            compared = (golden, target), (noise, target), (golden, noise), (golden, torch.zeros_like(golden))
            sums += [part.mean(F.mse_loss(a, b)).item() * len(rows) for a, b in compared]
        names = "losses/mse_held_out", "losses/mse_of_input", "noise/shift", "noise/std"
        means = sums / len(held_out_rows)
        means[2:] **= 0.5
        return dict(zip(names, means.tolist(), strict=True))

    guard = Guard(npnet, counters)
    if counters.best is None:
        counters.best = held_out_losses()["losses/mse_held_out"]
        guard.check(counters.best)
    left = range(counters.step, updates)
    bar = tqdm(left, initial=counters.step, total=updates, desc="npnet", unit="update", disable=not is_main())
    for update in bar:
        # Every epoch has its own order; an update and its noise depend only on (seed, update).
        epoch, index = divmod(update, updates_per_epoch)
        order = stream_rng(config.seed, Stream.BATCH_ORDER, epoch).permutation(train_rows)
        rows = order[index * config.batch_size : (index + 1) * config.batch_size]

        # Loss and step.
        drawn = draw(rows, stream_rng(config.seed, Stream.REPARAMETERIZATION, update))
        mse = torch.zeros((), device=run.device)
        optimizer.zero_grad(set_to_none=True)
        for part in shard(len(rows)).split(config.micro_batches):
            noise, target, text = batch(rows, part, drawn)
            loss = part.weight * F.mse_loss(npnet(noise, text), target)
            loss.backward()
            mse += loss.detach()
        sum_gradients(npnet)
        mse = all_sum(mse)
        norm = torch.nn.utils.clip_grad_norm_(npnet.parameters(), config.max_grad_norm)
        if guard.accepts(mse, norm):  # otherwise this update is skipped and counted
            optimizer.step()
        schedule.step()

        # Records, the best so far and checkpoints.
        counters.step, counters.seconds = update + 1, time.time() - began
        if counters.step % config.evaluate_every == 0 or counters.step == updates:
            record = {"losses/mse": mse.item()} | held_out_losses() | guard.record
            record["charts/learning_rate"] = float(schedule.get_last_lr()[0])
            if record["losses/mse_held_out"] < counters.best:
                counters.best = record["losses/mse_held_out"]
                best.load_state_dict(npnet.state_dict())
            run.log(record, counters.step)
            bar.set_postfix(mse=f"{record['losses/mse']:.4f}", held_out=f"{record['losses/mse_held_out']:.4f}")
        if (counters.step % config.save_every == 0 or run.stopping) and counters.step < updates:
            guard.check(held_out_losses()["losses/mse_held_out"])
            run.save(npnet, counters, **parts)
    npnet.load_state_dict(best.state_dict())
    run.save(npnet, counters, **parts)
    if is_main():
        print(f"best held-out loss: {counters.best:.5f} in {counters.step} updates", flush=True)
    run.close()
    return npnet.eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(NPNetTrainingConfig, argv, __doc__)
    train(config)
    if is_main():
        print(f"network: {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
