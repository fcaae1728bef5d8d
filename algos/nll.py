"""Pretraining on pairs: negative log-likelihood plus reconstruction (NoiseAR §2.3).

    loss = -log p(x' | text) / (N·A)  +  w · mean (x̂ - x')²,   x̂ = μ + σ·ε

with ``x'`` the target noise of a pair, teacher forcing, and ``w = 0.2``. Adam, cosine decay (appendix E.1.2).
Prompts of held-out pairs are never trained on. Pairs of kind ``signal_leak`` give the target's mean and the standard
deviation of the noise on top of it: the prefix is drawn again at every update, and the expectation over a patch's own
noise is taken in closed form.

    noisear pairs --config configs/shapes/signal_leak.yaml --output-dir runs/pairs
    python algos/nll.py --config configs/shapes/nll_signal_leak.yaml --pairs runs/pairs

Shapes: ``b`` pairs of a batch, ``N`` patches, ``A`` elements per patch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    Share,
    check_config,
    parse_config,
)
from noisear_rl.data.pairs import load_pairs
from noisear_rl.denoisers import DenoiserName, DenoiserOptions, load_denoiser, policy_sizes
from noisear_rl.files import read_manifest
from noisear_rl.gaussian import kl_to_gaussian
from noisear_rl.learning.losses import nll_loss, reconstruction_loss
from noisear_rl.learning.run import Counters, Run, split_by_prompt
from noisear_rl.learning.text_pathway import fit_text
from noisear_rl.patches import patchify
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, initial_policy, text_encoder_of
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.seeds import Stream, stream_rng


@dataclass
class NLLConfig:
    """Options of pretraining."""

    pairs: Path = Path("runs/pairs")
    """Folder that `noisear pairs` or `noisear shared-noise` wrote."""
    init_from: str | None = None
    """Checkpoint, run folder, `shapes/NAME` or Hub id to start from; unset for a fresh policy (Gaussian noise)."""
    output_dir: Path = Path("runs/nll")
    """Run folder."""
    denoiser: DenoiserName = "shapes"
    """Denoiser that the pairs were made with; the policy reads its text embeddings or its tokens."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32` or `path FOLDER`."""
    policy: NoiseARConfig = field(default_factory=NoiseARConfig)
    """A fresh policy, in the denoiser's sizes."""
    epochs: PositiveInt = 10
    """Passes over the pairs."""
    batch_size: PositiveInt = 40
    """Pairs per update."""
    learning_rate: NonNegativeFloat = 6.25e-5
    """Adam's learning rate at the start of the cosine decay."""
    reconstruction_weight: NonNegativeFloat = 0.2
    """Weight of the reconstruction loss."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    held_out_share: Share = 0.05
    """Share of the prompts whose pairs are only validated on."""
    held_out_pairs: PositiveInt = 512
    """Held-out pairs per validation, at most."""
    log_every: PositiveInt = 20
    """Updates between validations and records."""
    seed: Seed = 0
    """Seed of initialisation, order and reparameterisation noise."""
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


def train(config: NLLConfig) -> NoiseARPolicy:
    """Pretrains a policy and returns it in eval mode; see the module's docstring.

    Raises:
        ValueError: If the pairs were made for another denoiser or are too few to hold some out.
        FileNotFoundError: If there are no pairs.
        FileExistsError: If the run folder holds a run and ``resume`` is false.
    """
    run = Run(config.output_dir, config, resume=config.resume, wandb=config.wandb)

    # Data and denoiser.
    pairs = load_pairs(config.pairs).with_format("numpy")
    manifest = read_manifest(config.pairs)
    if manifest["denoiser"] != config.denoiser:
        raise ValueError(f"{config.pairs} was made for denoiser {manifest['denoiser']!r}, not {config.denoiser!r}")
    noise_scale = manifest["noise_scale"]  # 0 where the targets hold their own noise
    denoiser = load_denoiser(config.denoiser, **config.denoiser_options)
    prompts = [str(prompt) for prompt in pairs["prompt"][:]]
    train_rows, held_out_rows = split_by_prompt(prompts, config.held_out_share, config.seed)
    held_out_rows = stream_rng(config.seed, Stream.HELD_OUT_ROWS).permutation(held_out_rows)[: config.held_out_pairs]

    # Policy.
    torch.manual_seed(config.seed)
    shape, owner = tuple(denoiser.latent_shape), f"denoiser {denoiser.name!r}"
    reader = PromptReader(text_encoder_of(config.init_from, config.policy), denoiser)
    sizes = policy_sizes(denoiser, denoiser.patch_size) | reader.sizes
    policy = initial_policy(config.init_from, config.policy, sizes, owner, any_patch_size=True).to(run.device)
    fit_text(policy, reader, [prompts[row] for row in train_rows], config.seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    updates_per_epoch = -(-len(train_rows) // config.batch_size)
    updates = config.epochs * updates_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    counters = run.load(policy, optimizer=optimizer, schedule=schedule) if config.resume else Counters()
    began = time.time() - counters.seconds

    def losses(rows: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        latents = torch.from_numpy(np.stack(pairs[rows]["target"])).float().unflatten(1, shape)
        target = patchify(latents, policy.config.patch_size).to(run.device)  # (b, N, A)
        text, mask = (part.to(run.device) for part in reader.read_prompts([prompts[row] for row in rows]))
        noise = torch.from_numpy(rng.standard_normal(target.shape)).to(target)
        prefix = target
        if noise_scale:
            prefix = target + noise_scale * torch.from_numpy(rng.standard_normal(target.shape)).to(target)
        distribution = policy.distribution(prefix, text, mask)
        return {
            "losses/nll": nll_loss(distribution, target, noise_scale),
            "losses/reconstruction": reconstruction_loss(distribution, target, noise),
            "policy/kl_to_gaussian": kl_to_gaussian(distribution).sum(1).mean().detach(),
        }

    bar = tqdm(range(counters.step, updates), initial=counters.step, total=updates, desc="nll", unit="update")
    for update in bar:
        # Every epoch has its own order; the rest depends on the seed and the update alone.
        epoch, index = divmod(update, updates_per_epoch)
        order = stream_rng(config.seed, Stream.BATCH_ORDER, epoch).permutation(train_rows)
        rows = order[index * config.batch_size : (index + 1) * config.batch_size]

        # Loss and step.
        policy.train()
        values = losses(rows, stream_rng(config.seed, Stream.REPARAMETERIZATION, update))
        loss = values["losses/nll"] + config.reconstruction_weight * values["losses/reconstruction"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()

        # Records and checkpoints.
        counters.step, counters.seconds = update + 1, time.time() - began
        last = counters.step == updates
        if counters.step % config.log_every == 0 or last:
            policy.eval()
            with torch.no_grad():
                held = losses(held_out_rows, stream_rng(config.seed, Stream.HELD_OUT_NOISE))
            record = {key: value.item() for key, value in values.items()}
            record |= {"losses/nll_held_out": held["losses/nll"].item(), "losses/total": loss.item()}
            record["charts/learning_rate"] = float(schedule.get_last_lr()[0])
            run.log(record, counters.step)
            bar.set_postfix(nll=f"{record['losses/nll']:.4f}", held_out=f"{record['losses/nll_held_out']:.4f}")
        if counters.step % config.save_every == 0 or last or run.stopping:
            run.save(policy, counters, optimizer=optimizer, schedule=schedule)
    run.close()
    return policy.eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(NLLConfig, argv, __doc__)
    train(config)
    print(f"policy: {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
