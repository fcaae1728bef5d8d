"""Pretraining on pairs: negative log-likelihood plus reconstruction (NoiseAR §2.3).

    loss = -log p(x' | text) / (N·A)  +  w · mean (x̂ - x')²,   x̂ = μ + σ·ε

with ``x'`` the target noise of a pair, teacher forcing, and ``w = 0.2``. Adam, cosine decay (appendix E.1.2).
Prompts of held-out pairs are never trained on. Pairs of kind ``signal_leak`` give the target's mean and the standard
deviation of the noise on top of it: the prefix is drawn again at every update, and the expectation over a patch's own
noise is taken in closed form. Pairs of several layouts per prompt train a policy that has ``layouts``: its density is
then ``p(k | text)·p(x' | k, text)``, and the first patch, which chooses, stays standard normal
(``noisear_rl/policy/layouts.py``).

    noisear pairs --config shapes/signal_leak --output-dir runs/pairs
    noisear nll --config shapes/nll_signal_leak --pairs runs/pairs

Several processes share the pairs of a batch (``noisear_rl/distributed.py``); their number changes no result, except for
the masks of dropout.

Shapes: ``B`` pairs of a batch, ``b`` of them in a micro-batch of this process, ``N`` patches, ``A`` elements per patch.
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
from noisear_rl.data.layouts import LayoutRows
from noisear_rl.data.pairs import load_pairs
from noisear_rl.denoisers import DenoiserName, DenoiserOptions, load_denoiser, policy_sizes
from noisear_rl.distributed import Part, all_sum, is_main, process, same_everywhere, shard, sum_gradients
from noisear_rl.files import read_manifest
from noisear_rl.gaussian import kl_to_gaussian
from noisear_rl.learning.guards import Guard
from noisear_rl.learning.losses import nll_loss, reconstruction_loss
from noisear_rl.learning.run import Counters, Run, split_by_prompt
from noisear_rl.learning.text_pathway import fit_text
from noisear_rl.patches import patchify
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, Precision, initial_policy, text_encoder_of
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
    micro_batches: PositiveInt = 1
    """Parts that gradients are computed in, one after the other: less memory, the same result."""
    precision: Precision = "float32"
    """Of the policy: `float32`, or `bfloat16` (autocast over float32 weights; densities stay float32)."""
    compile: bool = False
    """Compile the policy (torch.compile). The first update takes longer, and results differ by rounding."""
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
    layouts = None
    if "layout" in pairs.column_names:
        layouts = LayoutRows(prompts, pairs["layout"][:].tolist())
        train_rows, held_out_rows = layouts.leads(train_rows), layouts.leads(held_out_rows)
    held_out_rows = stream_rng(config.seed, Stream.HELD_OUT_ROWS).permutation(held_out_rows)[: config.held_out_pairs]

    # Policy.
    torch.manual_seed(config.seed)
    shape, owner = tuple(denoiser.latent_shape), f"denoiser {denoiser.name!r}"
    reader = PromptReader(text_encoder_of(config.init_from, config.policy), denoiser)
    sizes = policy_sizes(denoiser, denoiser.patch_size) | reader.sizes
    policy = initial_policy(config.init_from, config.policy, sizes, owner, any_patch_size=True).to(run.device)
    if layouts and policy.config.layouts <= layouts.layout.max():
        needed = layouts.layout.max() + 1
        raise ValueError(f"{config.pairs} has several layouts per prompt: set policy.layouts to at least {needed}")
    reader.embed_all(prompts)
    fit_text(policy, reader, [prompts[row] for row in train_rows], config.seed)
    same_everywhere(policy)
    policy.compute_in(config.precision, config.compile)
    scale = torch.full((policy.n_patches, 1), noise_scale, device=run.device)  # of the noise on each patch
    if layouts:
        scale[0] = 1.0
        held_out_rows = layouts.draw(held_out_rows, stream_rng(config.seed, Stream.HELD_OUT_LAYOUTS))
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, fused=True)
    updates_per_epoch = -(-len(train_rows) // config.batch_size)
    updates = config.epochs * updates_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    counters = run.load(policy, optimizer=optimizer, schedule=schedule) if config.resume else Counters()
    guard = Guard(policy, counters)
    began = time.time() - counters.seconds

    def draw(rows: np.ndarray, stream: Stream, update: int = 0) -> list[torch.Tensor]:
        """Noise of the samples and of the prefixes of a batch, ``(B, N, A)`` each."""
        rng, size = stream_rng(config.seed, stream, update), (len(rows), policy.n_patches, policy.patch_dim)
        return [torch.from_numpy(rng.standard_normal(size)) for _ in range(2 if noise_scale else 1)]

    def losses(rows: np.ndarray, part: Part, drawn: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Means over the pairs of a part of a batch."""
        own = rows[part.rows]
        latents = torch.from_numpy(np.stack(pairs[own]["target"])).float().unflatten(1, shape)
        target = patchify(latents, policy.config.patch_size).to(run.device)  # (b, N, A)
        if layouts:
            target[:, 0] = 0.0
        text, mask = (x.to(run.device) for x in reader.read_prompts([prompts[row] for row in own]))
        noise, *added = (x[part.rows].to(target) for x in drawn)
        prefix = target + scale * added[0] if added else target
        if layouts:
            layout = torch.from_numpy(layouts.layout[own]).to(run.device)
            distribution, layout_log_prob = policy.given_layout(prefix, text, mask, layout)
        else:
            distribution = policy.distribution(prefix, text, mask)
        values = {
            "losses/nll": nll_loss(distribution, target, scale),
            "losses/reconstruction": reconstruction_loss(distribution, target, noise),
            "policy/kl_to_gaussian": kl_to_gaussian(distribution).sum(1).mean().detach(),
        }
        if layouts:
            values["losses/nll"] = values["losses/nll"] - layout_log_prob.mean() / target[0].numel()
            values["losses/layout"] = -layout_log_prob.mean().detach()  # nats
        return values

    @torch.no_grad()
    def held_out_loss() -> float:
        policy.eval()
        mine, drawn = shard(len(held_out_rows)), draw(held_out_rows, Stream.HELD_OUT_NOISE)
        return mine.mean(losses(held_out_rows, mine, drawn)["losses/nll"]).item()

    left = range(counters.step, updates)
    bar = tqdm(left, initial=counters.step, total=updates, desc="nll", unit="update", disable=not is_main())
    for update in bar:
        # Every epoch has its own order; the rest depends on the seed and the update alone.
        epoch, index = divmod(update, updates_per_epoch)
        order = stream_rng(config.seed, Stream.BATCH_ORDER, epoch).permutation(train_rows)
        rows = order[index * config.batch_size : (index + 1) * config.batch_size]

        # Loss and step.
        policy.train()
        masks = int(stream_rng(config.seed, Stream.DROPOUT, update).integers(2**31))
        torch.manual_seed(masks + process().process_index)
        if layouts:
            rows = layouts.draw(rows, stream_rng(config.seed, Stream.LAYOUTS, update))
        mine, drawn = shard(len(rows)), draw(rows, Stream.REPARAMETERIZATION, update)
        parts: list[dict[str, torch.Tensor]] = []
        optimizer.zero_grad(set_to_none=True)
        for part in mine.split(config.micro_batches):
            values = losses(rows, part, drawn)
            loss = values["losses/nll"] + config.reconstruction_weight * values["losses/reconstruction"]
            (part.weight * loss).backward()
            values["losses/total"] = loss
            parts.append({key: part.weight * value.detach() for key, value in values.items()})
        sum_gradients(policy)
        means = {key: all_sum(torch.stack([part[key] for part in parts]).sum()) for key in values}
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        if guard.accepts(means["losses/total"], norm):  # otherwise this update is skipped and counted
            optimizer.step()
        schedule.step()

        # Records and checkpoints.
        counters.step, counters.seconds = update + 1, time.time() - began
        last = counters.step == updates
        logs, saves = (counters.step % every == 0 or last for every in (config.log_every, config.save_every))
        saves |= run.stopping
        held_out = held_out_loss() if logs or saves else 0.0
        if logs:
            record = {key: value.item() for key, value in means.items()} | guard.record
            record["losses/nll_held_out"] = held_out
            record["charts/learning_rate"] = float(schedule.get_last_lr()[0])
            run.log(record, counters.step)
            bar.set_postfix(nll=f"{record['losses/nll']:.4f}", held_out=f"{record['losses/nll_held_out']:.4f}")
        if saves:
            guard.check(held_out)
            run.save(policy, counters, optimizer=optimizer, schedule=schedule)
    run.close()
    return policy.eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(NLLConfig, argv, __doc__)
    train(config)
    if is_main():
        print(f"policy: {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
