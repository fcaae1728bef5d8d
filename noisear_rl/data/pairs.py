"""Builds pairs of a prompt and a noise for pretraining: ``noisear pairs --help``.

Two kinds: ``weak_to_strong``, the noise that strong guidance would have preferred
(:mod:`~noisear_rl.data.weak_to_strong`), and ``signal_leak``, the noise that the forward process would have made of a
good image (:mod:`~noisear_rl.data.signal_leak`). Several processes share the shards:
``torchrun --nproc-per-node 4 -m noisear_rl.data.pairs …``.

Shapes: ``B`` pairs, noise ``(B, C, h, w)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from noisear_rl.command import run_script
from noisear_rl.config import (
    Float,
    Guidance,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_config,
    parse_config,
    to_mapping,
)
from noisear_rl.data.shards import Columns, load_shards, shard_file, write_shard
from noisear_rl.data.signal_leak import Targets, signal_leak
from noisear_rl.data.weak_to_strong import InversionMode, inversion_coefficients, weak_to_strong
from noisear_rl.denoisers import (
    Denoiser,
    DenoiserName,
    DenoiserOptions,
    LatentDenoiser,
    NoisePredictor,
    dtype_of,
    load_denoiser,
    require,
)
from noisear_rl.distributed import barrier, is_main, process
from noisear_rl.files import check_manifest, sha256
from noisear_rl.gaussian import standard_noise
from noisear_rl.integrity import lock_folder
from noisear_rl.policy import load_policy, policy_sha256
from noisear_rl.policy.config import DENOISER
from noisear_rl.prompts import resolve_prompts
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.rewards import RewardSpec, WeightedReward, load_reward, reward_sha256
from noisear_rl.samplers.base import resolve_denoising_seeds

if TYPE_CHECKING:
    from datasets import Dataset

CHECKED = 4096  # pairs whose targets are checked at once
PairKind = Literal["weak_to_strong", "signal_leak"]
PAIR_FEATURES: Columns = {"prompt": "string", "seed": "int64", "target": "list<float16>"}
LAYOUT_FEATURES: Columns = {**PAIR_FEATURES, "layout": "int64"}  # where prompts have several layouts


@dataclass
class PairsConfig:
    """Options of pair construction."""

    denoiser: DenoiserName = "shapes"
    """Name or folder of the denoiser."""
    kind: PairKind = "weak_to_strong"
    """How targets are made."""
    prompts: str | tuple[str, ...] | None = None
    """Prompts, a text file, or a split of `shapes`; unset for the default of the denoiser."""
    output_dir: Path = Path("runs/pairs")
    """Folder for the shards and the manifest."""
    pairs: PositiveInt = 4096
    """Number of noises to start from; prompts are cycled with new noise."""
    filter_reward: RewardSpec | None = None
    """Weak-to-strong: keep a pair only if this scorer prefers the target's image; unset keeps all and draws no images.
    Signal leak: keep an image only if it scores at least `min_reward`."""
    reward_device: str | None = None
    """Device of the scorers, such as `cuda:1`; unset for the accelerator if there is one."""
    min_reward: Float = 0.8
    """Signal leak: minimum score of an image."""
    policy: str | None = None
    """Signal leak: checkpoint, run folder, `shapes/NAME` or Hub id of the policy that draws the first noise; unset for
    Gaussian noise."""
    signal_strength: PositiveFloat = 1.5
    """Signal leak: factor on the layout's share; 1 is the share that the denoiser saw in training."""
    noise_scale: PositiveFloat = 0.8
    """Signal leak: standard deviation of the added noise, drawn anew whenever a pair is used."""
    strong_guidance: Guidance = 5.5
    """Guidance of the step down."""
    weak_guidance: Guidance = 1.0
    """Guidance of the step up."""
    num_inference_steps: PositiveInt = 50
    """Length of the DDIM schedule; fewer steps mean larger ones."""
    inversion: InversionMode = "exact"
    """`exact`, or `compat` to match public scripts."""
    rounds: PositiveInt = 1
    """Weak-to-strong: repetitions of the pair of steps. Signal leak: images per pair; each image after the first
    starts from the leak of the last good one, and all good ones are kept."""
    seed: Seed = 0
    """Pair i starts from the Gaussian noise of seed `seed + i`."""
    batch_size: PositiveInt = 128
    """Pairs per batch."""
    shard_size: PositiveInt = 1024
    """Pairs per Parquet file; an interrupted command resumes after the last complete file."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32`."""

    def __post_init__(self) -> None:
        check_config(self)


def build_pairs(config: PairsConfig, denoiser: Denoiser | None = None) -> Dataset:
    """Writes shards of pairs and returns them as one dataset.

    Columns: ``prompt``, ``seed`` (of the starting noise, see :func:`noisear_rl.gaussian.standard_noise`) and
    ``target`` (float16, flattened ``(C, h, w)``), without the noise of scale ``noise_scale`` (in the manifest) that is
    added on use. Leaks of a policy with layouts have a fourth one, ``layout``: what its first patch chose.

    Args:
        config: Options.
        denoiser: Denoiser to use instead of the one named in ``config``.

    Raises:
        ValueError: If an option is out of range, the folder contains pairs of other settings, or no pair passed the
            filter.
    """
    check_config(config)
    leak = config.kind == "signal_leak"
    if leak and config.filter_reward is None:
        raise ValueError("signal_leak chooses images by a reward: set filter_reward")
    state = process()
    prompts = resolve_prompts(config.prompts, denoiser.name if denoiser else config.denoiser).prompts
    reward = load_reward(config.filter_reward, device=config.reward_device) if config.filter_reward else None
    if reward:
        reward.check_prompts(prompts)
    denoiser = denoiser or load_denoiser(config.denoiser, **config.denoiser_options)
    if leak and not require(denoiser, LatentDenoiser, "signal_leak").signal_level > 0:
        raise ValueError(f"the schedule of {denoiser.name!r} starts from pure noise, so no signal leaks into it")
    if not leak:  # fails before anything long
        predictor = require(denoiser, NoisePredictor, "weak_to_strong")
        inversion_coefficients(predictor.first_order_schedule(config.num_inference_steps), config.inversion)
    policy = load_policy(config.policy) if leak and config.policy else None
    reader = PromptReader(policy.config.text_encoder, denoiser) if policy else None
    (reader or PromptReader(DENOISER, denoiser)).embed_all(prompts)
    manifest = to_mapping(config) | {
        "noise_scale": config.noise_scale if leak else 0.0,
        "policy_sha256": policy_sha256(policy) if policy else None,
        "prompts_sha256": sha256(prompts),
        "latent_shape": list(denoiser.latent_shape),
        "revision": denoiser.revision,
        "denoiser_steps": denoiser.num_inference_steps,
        "guidance_scale": denoiser.guidance_scale,
        "dtype": dtype_of(denoiser),
    }
    if config.filter_reward and (checksum := reward_sha256(config.filter_reward)):
        manifest["reward_sha256"] = checksum
    for key in ("output_dir", "prompts", "batch_size", "denoiser_options", "reward_device"):
        manifest.pop(key)  # these do not change the pairs
    _lock = lock_folder(config.output_dir) if is_main() else None
    if is_main():
        check_manifest(config.output_dir, manifest)
    barrier()
    bar = tqdm(total=config.pairs, desc="pairs", unit="pair", disable=not is_main())
    for shard, start in enumerate(range(0, config.pairs, config.shard_size)):
        end = min(start + config.shard_size, config.pairs)
        if shard % state.num_processes != state.process_index or shard_file(config.output_dir, shard).exists():
            bar.update(end - start)
            continue
        features = LAYOUT_FEATURES if policy and policy.config.layouts else PAIR_FEATURES
        rows: dict[str, list[Any]] = {key: [] for key in features}
        for low in range(start, end, config.batch_size):
            indices = range(low, min(low + config.batch_size, end))
            texts, seeds = [prompts[i % len(prompts)] for i in indices], [config.seed + i for i in indices]
            if leak:
                assert reward is not None
                found = signal_leak(
                    require(denoiser, LatentDenoiser, "signal_leak"),
                    policy,
                    reward,
                    texts,
                    seeds,
                    min_reward=config.min_reward,
                    signal_strength=config.signal_strength,
                    noise_scale=config.noise_scale,
                    rounds=config.rounds,
                    reader=reader,
                )
            else:
                found = [_weak_to_strong(predictor, reward, config, texts, seeds)]
            for targets in found:
                halves = targets.mean.flatten(1).half().cpu()
                chosen = (targets.kept & halves.isfinite().all(1)).nonzero()[:, 0].tolist()
                rows["prompt"] += [texts[i] for i in chosen]
                rows["seed"] += [seeds[i] for i in chosen]
                rows["target"] += list(halves[chosen].numpy())
                if targets.layout is not None:
                    rows["layout"] += targets.layout[chosen].tolist()
            bar.update(len(indices))
        write_shard(config.output_dir, shard, rows, features)
    bar.close()
    barrier()
    return load_pairs(config.output_dir)


def _weak_to_strong(
    denoiser: NoisePredictor,
    reward: WeightedReward | None,
    config: PairsConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> Targets:
    """Targets, of which a reward keeps those that raise it."""
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
        return Targets(target, torch.ones(len(target), dtype=torch.bool))
    own = resolve_denoising_seeds(seeds)  # the same for both, so that only the noise differs
    both = (noise, target.nan_to_num())
    before, after = (reward.score(denoiser.denoise(x, conditioning, own), prompts) for x in both)
    return Targets(target, (after > before).cpu())


def load_pairs(folder: str | Path) -> Dataset:
    """Loads the pairs that :func:`build_pairs` wrote.

    Raises:
        FileNotFoundError: If the folder contains no pairs.
        ValueError: If the filter rejected all pairs, or a target is not finite.
    """
    pairs = load_shards(folder, "pairs", "noisear pairs")
    if not len(pairs):
        raise ValueError(f"{folder}: no pair passed the reward filter, or had a finite target (see strong_guidance)")
    batches = pairs.with_format("numpy").iter(CHECKED)
    if not all(np.isfinite(np.stack(batch["target"])).all() for batch in batches):
        raise ValueError(f"{folder}: some targets hold NaN or infinite values: make the pairs again")
    return pairs


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(PairsConfig, argv, __doc__)
    pairs = build_pairs(config)
    if is_main():
        print(f"{len(pairs)} of {config.pairs} pairs kept in {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
