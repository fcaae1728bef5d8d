"""Weak-to-strong pairs: noise and the noise that strong guidance would have preferred.

One step down with strong guidance, one step back up with weak guidance, both predictions at the same
timestep ``t0`` (NoiseAR §3.1; Bai et al. arXiv 2502.00473; Golden Noise arXiv 2411.09502). For pairs on
disk: ``python -m noisear_rl.pairs --help``.

Shapes: ``B`` pairs, noise ``(B, C, h, w)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value
from diffusers import DDIMScheduler
from tqdm.auto import tqdm

from noisear_rl.denoisers import Conditioning, Denoiser, load_denoiser
from noisear_rl.envs.noise_task import load_prompts
from noisear_rl.gaussian import standard_noise
from noisear_rl.rewards import load_reward
from noisear_rl.shards import check_manifest, load_shards, shard_file, write_shard
from noisear_rl.training import parse_config, to_mapping

INVERSIONS = ("exact", "compat")


@dataclass(frozen=True)
class Inversion:
    """Coefficients of one step down and one back up: ``x1 = a·x0 + b·ε_s``, ``x0' = c·x1 + d·ε_w``."""

    timestep: int
    a: float
    b: float
    c: float
    d: float

    @property
    def k(self) -> float:
        """Strength of the shift: ``x0' = a·c·x0 + k·(ε_w - ε_s)`` where the inversion is exact."""
        return self.d


def inversion_coefficients(scheduler: DDIMScheduler, inversion: str = "exact") -> Inversion:
    """Coefficients at the first two timesteps of a schedule whose timesteps are set.

    Args:
        scheduler: Deterministic DDIM (``eta = 0``).
        inversion: ``exact``: the inverse of the step just taken. ``compat``: what public scripts compute with
            ``DDIMInverseScheduler``, which inverts the *next* step's interval and so scales the noise (by
            1.0035 on SDXL's schedule at 50 steps).

    Raises:
        ValueError: If the inversion is unknown or there are too few timesteps.
    """
    if inversion not in INVERSIONS:
        raise ValueError(f"unknown inversion {inversion!r}; expected one of {INVERSIONS}")
    needed = 2 if inversion == "exact" else 3
    times = [int(t) for t in scheduler.timesteps[:needed]]
    if len(times) < needed:
        raise ValueError(f"{inversion!r} inversion needs at least {needed} timesteps")
    alpha = [float(scheduler.alphas_cumprod[t]) for t in times]
    high, low = (alpha[0], alpha[1]) if inversion == "exact" else (alpha[1], alpha[2])
    a = (alpha[1] / alpha[0]) ** 0.5
    c = (high / low) ** 0.5
    return Inversion(
        timestep=times[0],
        a=a,
        b=(1 - alpha[1]) ** 0.5 - a * (1 - alpha[0]) ** 0.5,
        c=c,
        d=(1 - high) ** 0.5 - c * (1 - low) ** 0.5,
    )


def weak_to_strong(
    denoiser: Denoiser,
    noise: torch.Tensor,
    conditioning: Conditioning,
    *,
    strong_guidance: float = 5.5,
    weak_guidance: float = 1.0,
    num_inference_steps: int = 50,
    inversion: str = "exact",
    rounds: int = 1,
) -> torch.Tensor:
    """The target noise of a pair, at the price of two guided predictions a round.

    Args:
        denoiser: Any denoiser with an ε-prediction.
        noise: ``(B, C, h, w)`` from N(0, I). Not changed.
        conditioning: Of ``B`` prompts.
        strong_guidance: Guidance of the step down.
        weak_guidance: Guidance of the step up.
        num_inference_steps: Length of the DDIM schedule; fewer steps are larger ones.
        inversion: See :func:`inversion_coefficients`.
        rounds: How often to repeat, each time from the last target.

    Returns:
        ``(B, C, h, w)`` float32.
    """
    step = inversion_coefficients(denoiser.ddim_schedule(num_inference_steps), inversion)
    target = noise.float()
    for _ in range(rounds):
        strong = denoiser.predict_noise(target, step.timestep, conditioning, strong_guidance)
        lower = step.a * target + step.b * strong
        weak = denoiser.predict_noise(lower, step.timestep, conditioning, weak_guidance)
        target = step.c * lower + step.d * weak
    return target


@dataclass
class PairsConfig:
    """Options of pair construction."""

    denoiser: str = "shapes"
    """Denoiser's name or folder."""
    prompts: str | None = None
    """Text file with a prompt a line, or a split of `shapes`; unset for the training captions."""
    output_dir: Path = Path("runs/pairs")
    """Where shards and the manifest go."""
    pairs: int = 4096
    """How many pairs; prompts are repeated in turn with new noise."""
    strong_guidance: float = 5.5
    """Guidance of the step down."""
    weak_guidance: float = 1.0
    """Guidance of the step up."""
    num_inference_steps: int = 50
    """Length of the DDIM schedule; fewer steps are larger ones."""
    inversion: str = "exact"
    """`exact`, or `compat` with public scripts."""
    rounds: int = 1
    """How often the pair of steps is repeated."""
    filter_reward: str | None = None
    """Keep a pair only if this scorer prefers the target's image; unset keeps all and renders none."""
    seed: int = 0
    """Pair i starts from the Gaussian noise of seed `seed + i`."""
    batch_size: int = 128
    """Pairs computed at once."""
    shard_size: int = 1024
    """Pairs a Parquet file; an interrupted command goes on after the last whole one."""
    denoiser_options: dict[str, str] = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32`."""


def build_pairs(config: PairsConfig, denoiser: Denoiser | None = None) -> Dataset:
    """Writes shards of pairs and returns them as one dataset.

    Columns: ``prompt``, ``seed`` (of the starting noise, see :func:`noisear_rl.policy.standard_noise`) and
    ``target`` (float16, flattened ``(C, h, w)``).

    Raises:
        ValueError: If the folder holds pairs of other settings, or no pair passed the filter.
    """
    denoiser = denoiser or load_denoiser(config.denoiser, **config.denoiser_options)
    prompts = list(dict.fromkeys(load_prompts(config.prompts, denoiser.name)))
    manifest = to_mapping(config) | {
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "latent_shape": list(denoiser.latent_shape),
    }
    manifest.pop("output_dir")
    check_manifest(config.output_dir, manifest)
    reward = load_reward(config.filter_reward) if config.filter_reward else None
    starts = range(0, config.pairs, config.shard_size)
    bar = tqdm(total=config.pairs, desc="pairs", unit="pair")
    for shard, start in enumerate(starts):
        end = min(start + config.shard_size, config.pairs)
        if not shard_file(config.output_dir, shard).exists():
            rows: dict[str, list] = {"prompt": [], "seed": [], "target": []}
            for low in range(start, end, config.batch_size):
                indices = range(low, min(low + config.batch_size, end))
                _append(rows, denoiser, config, reward, [prompts[i % len(prompts)] for i in indices], indices)
                bar.update(len(indices))
            features = Features({"prompt": Value("string"), "seed": Value("int64"), "target": List(Value("float16"))})
            write_shard(config.output_dir, shard, rows, features)
        else:
            bar.update(end - start)
    bar.close()
    return load_pairs(config.output_dir)


def _append(rows, denoiser: Denoiser, config: PairsConfig, reward, prompts: Sequence[str], indices: range) -> None:
    seeds = [config.seed + i for i in indices]
    conditioning = denoiser.encode(prompts)
    noise = standard_noise(seeds, denoiser.latent_shape)
    target = weak_to_strong(
        denoiser,
        noise,
        conditioning,
        strong_guidance=config.strong_guidance,
        weak_guidance=config.weak_guidance,
        num_inference_steps=config.num_inference_steps,
        inversion=config.inversion,
        rounds=config.rounds,
    ).cpu()
    keep = torch.ones(len(seeds), dtype=torch.bool)
    if reward is not None:
        before, after = (reward.score(denoiser.denoise(x, conditioning, seeds), prompts) for x in (noise, target))
        keep = (after > before).cpu()
    chosen = keep.nonzero()[:, 0].tolist()
    rows["prompt"] += [prompts[i] for i in chosen]
    rows["seed"] += [seeds[i] for i in chosen]
    rows["target"] += list(target[keep].flatten(1).half().numpy())


def load_pairs(folder: str | Path) -> Dataset:
    """Loads the pairs that :func:`build_pairs` wrote.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the filter left none.
    """
    pairs = load_shards(folder, "pairs", "python -m noisear_rl.pairs")
    if not len(pairs):
        raise ValueError(f"{folder}: no pair passed the reward filter")
    return pairs


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(PairsConfig, argv, __doc__)
    pairs = build_pairs(config)
    print(f"{len(pairs)} of {config.pairs} pairs kept in {config.output_dir}")


if __name__ == "__main__":
    main()
