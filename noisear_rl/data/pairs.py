"""Pairs of a prompt and a noise to learn from, of two kinds.

``weak_to_strong``: the noise that strong guidance would have preferred. One step down with strong guidance, one
step back up with weak guidance, both predictions at the same timestep ``t0`` (NoiseAR §3.1; Bai et al. arXiv
2502.00473; Golden Noise arXiv 2411.09502).

``signal_leak``: the noise that the forward process would have left of a good picture, ``√ᾱ·z0 + σ·ε``. Schedules do
not end in pure noise, so the layout leaks into what the model saw at its first timestep (Everaert et al. arXiv
2309.15842; Lin et al. arXiv 2305.08891). ``z0`` is the latent of a picture that the denoiser made of a policy's or
Gaussian noise and the reward accepted: rewards alone, no reward gradient, no pictures from elsewhere.

For pairs on disk: ``python -m noisear_rl.pairs --help``.

Several processes share the shards: ``accelerate launch --num-processes 4 -m noisear_rl.pairs …``.

Shapes: ``B`` pairs, noise ``(B, C, h, w)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tqdm.auto import tqdm

from noisear_rl.denoisers import Conditioning, Denoiser, load_denoiser
from noisear_rl.envs.noise_task import load_prompts
from noisear_rl.gaussian import standard_noise
from noisear_rl.policy.model import NoiseARPolicy
from noisear_rl.rewards import WeightedReward, load_reward
from noisear_rl.data.rollouts import policy_sha256
from noisear_rl.data.shards import check_manifest, load_shards, shard_file, write_shard
from noisear_rl.learning.run import load_policy, parse_config, to_mapping

INVERSIONS = ("exact", "compat")
KINDS = ("weak_to_strong", "signal_leak")
PAIR_FEATURES = Features({"prompt": Value("string"), "seed": Value("int64"), "target": List(Value("float16"))})


@dataclass(frozen=True)
class Inversion:
    """Coefficients of one step down and one back up: ``x1 = a·x0 + b·ε_s``, ``x0' = c·x1 + d·ε_w``."""

    timestep: float
    a: float
    b: float
    c: float
    d: float

    @property
    def k(self) -> float:
        """Strength of the shift: ``x0' = a·c·x0 + k·(ε_w - ε_s)`` where the inversion is exact."""
        return self.d


def inversion_coefficients(
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler, inversion: str = "exact"
) -> Inversion:
    """Coefficients at the first two timesteps of a schedule whose timesteps are set.

    Args:
        scheduler: Deterministic DDIM (``eta = 0``), or Euler for flow matching, where the prediction is a velocity:
            ``x1 = x0 + (σ1 - σ0)·v`` and back.
        inversion: ``exact``: the inverse of the step just taken. ``compat``: what public scripts compute with
            ``DDIMInverseScheduler``, which inverts the *next* step's interval and so scales the noise (by
            1.0035 on SDXL's schedule at 50 steps).

    Raises:
        ValueError: If the inversion is unknown or there are too few timesteps.
    """
    if inversion not in INVERSIONS:
        raise ValueError(f"unknown inversion {inversion!r}; expected one of {INVERSIONS}")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if inversion != "exact":
            raise ValueError(f"{inversion!r} inversion is a habit of DDIM scripts; flow matching has 'exact' alone")
        down = float(scheduler.sigmas[1] - scheduler.sigmas[0])
        return Inversion(float(scheduler.timesteps[0]), a=1.0, b=down, c=1.0, d=-down)
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
        denoiser: Any denoiser.
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
    step = inversion_coefficients(denoiser.first_order_schedule(num_inference_steps), inversion)
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
    kind: str = "weak_to_strong"
    """`weak_to_strong` or `signal_leak`."""
    prompts: str | tuple[str, ...] | None = None
    """Prompts, a text file, or a split of `shapes`; unset for the environment's default."""
    output_dir: Path = Path("runs/pairs")
    """Where shards and the manifest go."""
    pairs: int = 4096
    """How many noises to start from; prompts are repeated in turn with new noise."""
    filter_reward: str | None = None
    """Weak-to-strong: keep a pair only if this scorer prefers the target's image; unset keeps all and renders none.
    Signal leak: keep a picture only if it scores `min_reward`."""
    min_reward: float = 0.8
    """Signal leak: least score of a picture."""
    policy: str | None = None
    """Signal leak: checkpoint, run folder or Hub id that draws the first noise; unset for Gaussian noise."""
    signal_strength: float = 1.5
    """Signal leak: multiplies the layout's share; 1 is what the denoiser saw in its training."""
    noise_scale: float = 0.8
    """Signal leak: standard deviation of the noise on top, drawn anew whenever a pair is used."""
    strong_guidance: float = 5.5
    """Guidance of the step down."""
    weak_guidance: float = 1.0
    """Guidance of the step up."""
    num_inference_steps: int = 50
    """Length of the DDIM schedule; fewer steps are larger ones."""
    inversion: str = "exact"
    """`exact`, or `compat` with public scripts."""
    rounds: int = 1
    """Weak-to-strong: how often the pair of steps is repeated. Signal leak: how many pictures are made for a pair,
    each after the first from the leak of the last good one; all good ones are kept."""
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

    Columns: ``prompt``, ``seed`` (of the starting noise, see :func:`noisear_rl.gaussian.standard_noise`) and
    ``target`` (float16, flattened ``(C, h, w)``), without the noise that the manifest's ``noise_scale`` puts on it.

    Raises:
        ValueError: If an option is out of range, the folder holds pairs of other settings, or no pair passed the
            filter.
    """
    if config.kind not in KINDS:
        raise ValueError(f"unknown kind {config.kind!r}; expected one of {KINDS}")
    leak = config.kind == "signal_leak"
    if leak and config.filter_reward is None:
        raise ValueError("signal_leak chooses pictures by a reward: set filter_reward")
    if leak and not (config.noise_scale > 0 and config.signal_strength > 0):
        raise ValueError("noise_scale and signal_strength must be positive")
    state = PartialState()
    denoiser = denoiser or load_denoiser(config.denoiser, **config.denoiser_options)
    if leak and not denoiser.signal_level > 0:
        raise ValueError(f"the schedule of {denoiser.name!r} begins in pure noise, which nothing leaks into")
    policy = load_policy(config.policy) if leak and config.policy else None
    prompts = load_prompts(config.prompts, denoiser.name)
    manifest = to_mapping(config) | {
        "noise_scale": config.noise_scale if leak else 0.0,
        "policy_sha256": policy_sha256(policy) if policy else None,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "latent_shape": list(denoiser.latent_shape),
        "revision": denoiser.revision,
        "denoiser_steps": denoiser.num_inference_steps,
        "guidance_scale": denoiser.guidance_scale,
    }
    for key in ("output_dir", "prompts", "batch_size", "denoiser_options"):  # do not change what is written
        manifest.pop(key)
    check_manifest(config.output_dir, manifest)
    reward = load_reward(config.filter_reward) if config.filter_reward else None
    bar = tqdm(total=config.pairs, desc="pairs", unit="pair", disable=not state.is_main_process)
    for shard, start in enumerate(range(0, config.pairs, config.shard_size)):
        end = min(start + config.shard_size, config.pairs)
        if shard % state.num_processes != state.process_index or shard_file(config.output_dir, shard).exists():
            bar.update(end - start)
            continue
        rows: dict[str, list] = {"prompt": [], "seed": [], "target": []}
        for low in range(start, end, config.batch_size):
            indices = range(low, min(low + config.batch_size, end))
            texts, seeds = [prompts[i % len(prompts)] for i in indices], [config.seed + i for i in indices]
            if leak:
                found = _signal_leak(denoiser, policy, reward, config, texts, seeds)
            else:
                found = _weak_to_strong(denoiser, reward, config, texts, seeds)
            for target, kept in found:
                chosen = kept.nonzero()[:, 0].tolist()
                rows["prompt"] += [texts[i] for i in chosen]
                rows["seed"] += [seeds[i] for i in chosen]
                rows["target"] += list(target[kept].flatten(1).half().cpu().numpy())
            bar.update(len(indices))
        write_shard(config.output_dir, shard, rows, PAIR_FEATURES)
    bar.close()
    state.wait_for_everyone()
    return load_pairs(config.output_dir)


def _weak_to_strong(
    denoiser: Denoiser,
    reward: WeightedReward | None,
    config: PairsConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Targets ``(B, C, h, w)`` and which of them to keep ``(B,)``."""
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
    if reward is None:
        return [(target, torch.ones(len(target), dtype=torch.bool))]
    before, after = (reward.score(denoiser.denoise(x, conditioning, seeds), prompts) for x in (noise, target))
    return [(target, (after > before).cpu())]


def _signal_leak(
    denoiser: Denoiser,
    policy: NoiseARPolicy | None,
    reward: WeightedReward | None,
    config: PairsConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Means of the targets ``(B, C, h, w)`` and which of them to keep ``(B,)``, round by round."""
    assert reward is not None
    conditioning = denoiser.encode(prompts)
    if policy is not None:
        policy.to(conditioning.policy_embeds.device)
    level = config.signal_strength * denoiser.signal_level
    good = torch.zeros(len(seeds), dtype=torch.bool)  # has had a good picture
    mean = torch.zeros(len(seeds), *denoiser.latent_shape)  # leak of the last good one
    found = []
    text, mask = conditioning.policy_embeds, conditioning.policy_mask
    for i in range(config.rounds):
        own = [int(np.random.default_rng([seed, i]).integers(2**31)) if i else seed for seed in seeds]
        fresh = standard_noise(own, denoiser.latent_shape)
        first = fresh if policy is None else policy.noise(policy.sample(text, mask, seeds=own)).cpu()
        noise = torch.where(good[:, None, None, None], mean + config.noise_scale * fresh, first)
        images, latents = denoiser.denoise_with_latents(noise, conditioning, seeds)
        kept = (reward.score(images, prompts) >= config.min_reward).cpu()
        target = level * latents.cpu()
        found.append((target, kept))
        mean = torch.where(kept[:, None, None, None], target, mean)
        good |= kept
    return found


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
