"""Collects rollouts for offline algorithms: K noises per prompt from a policy, denoised, scored and written to disk.

    noisear collect --config shapes/collect --policy runs/nll --output-dir runs/rollouts
    torchrun --nproc-per-node 4 -m noisear_rl.cli collect --output-dir runs/rollouts    # the same rollouts

Shard ``s`` depends only on ``(seed, s)``. Processes share the shards; run an interrupted command again to write the
missing ones.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import noisear_rl  # noqa: F401  (registers the environments)
from noisear_rl.command import run_script
from noisear_rl.config import PositiveInt, Seed, check_config, parse_config
from noisear_rl.data.rollouts import load_rollouts, rollout_features, rollout_manifest
from noisear_rl.data.shards import shard_file, write_shard
from noisear_rl.denoisers import DenoiserName, DenoiserOptions
from noisear_rl.distributed import barrier, is_main, process
from noisear_rl.envs import EnvId, make_vector_env
from noisear_rl.files import check_manifest, sha256
from noisear_rl.images import save_png
from noisear_rl.integrity import lock_folder
from noisear_rl.policy import NoiseARConfig, initial_policy, policy_sha256, text_encoder_of
from noisear_rl.rewards import RewardSpec, reward_sha256
from noisear_rl.seeds import Stream, stream_rng


@dataclass
class CollectConfig:
    """Options of the collection."""

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
    """Prompts, a text file, or a split of `shapes`; unset for the environment's default."""
    policy: str | None = None
    """Checkpoint, run folder, `shapes/NAME` or Hub id that draws the noise; unset for Gaussian noise."""
    output_dir: Path = Path("runs/rollouts")
    """Folder for the shards and the manifest."""
    num_prompts: PositiveInt = 256
    """Number of prompts, chosen at random; all if there are fewer."""
    samples_per_prompt: PositiveInt = 16
    """Noises per prompt: K."""
    prompts_per_shard: PositiveInt = 16
    """Prompts per shard; the rollouts of a shard are denoised as one batch."""
    same_noise: bool = False
    """Use the same K noises for all prompts, so that rewards show which noises suit many prompts."""
    save_images: bool = False
    """Also store the images, as PNG."""
    seed: Seed = 0
    """Seed of prompts and noise."""

    def __post_init__(self) -> None:
        check_config(self)


def collect(config: CollectConfig) -> None:
    """Writes rollouts; see the module docstring and :mod:`noisear_rl.data.rollouts`.

    Raises:
        ValueError: If a count is below 1, the folder contains rollouts of other settings, the reward uses running
            statistics, or the policy does not fit the environment.
    """
    check_config(config)
    state, k = process(), config.samples_per_prompt
    _lock = lock_folder(config.output_dir) if is_main() else None
    batch = config.prompts_per_shard * k
    gaussian = NoiseARConfig(log_variance="fixed")  # an untrained policy draws Gaussian noise
    options: dict[str, Any] = {"denoiser": config.denoiser} | config.denoiser_options
    options |= {"prompts": config.prompts, "reward": config.reward, "reward_device": config.reward_device}
    options["text_encoder"] = text_encoder_of(config.policy, gaussian)
    envs = make_vector_env(config.env_id, batch, **options)
    task = envs.task
    if task.reward.normalize == "running":
        raise ValueError("running statistics depend on earlier rollouts; use normalize: fixed")

    policy = initial_policy(config.policy, gaussian, task.policy_sizes, str(task)).to(state.device)

    # Prompts and manifest.
    prompts = list(dict.fromkeys(task.prompts))
    order = stream_rng(config.seed, Stream.COLLECTED_PROMPTS).permutation(len(prompts))
    prompts = [prompts[i] for i in order[: config.num_prompts]]
    manifest = rollout_manifest(task) | {
        "seed": config.seed,
        "env_id": config.env_id,
        "policy": config.policy or "gaussian",
        "policy_sha256": policy_sha256(policy) if config.policy else "gaussian",
        "samples_per_prompt": k,
        "prompts_per_shard": config.prompts_per_shard,
        "prompts_sha256": sha256(prompts),
        "rollouts": len(prompts) * k,
        "same_noise": config.same_noise,
        "save_images": config.save_images,
    }
    if config.denoiser:  # instead of the environment's own; later rounds must use it, too
        manifest["env_denoiser"] = config.denoiser
    if config.reward:  # later rounds must use the same reward
        manifest["reward_spec"] = config.reward
        if checksum := reward_sha256(config.reward):
            manifest["reward_sha256"] = checksum
    if is_main():
        check_manifest(config.output_dir, manifest)
    barrier()
    features = rollout_features([reward.name for reward, _ in task.reward.rewards], config.save_images)

    starts = range(0, len(prompts), config.prompts_per_shard)
    bar = tqdm(total=len(prompts) * k, desc="collect", unit="image", disable=not is_main())
    for shard, start in enumerate(starts):
        chosen = prompts[start : start + config.prompts_per_shard]
        bar.update(len(chosen) * k)
        if shard % state.num_processes != state.process_index or shard_file(config.output_dir, shard).exists():
            continue
        repeated = [prompt for prompt in chosen for _ in range(k)]
        padded = repeated + repeated[:1] * (batch - len(repeated))  # the last shard may be short

        # Rollout. Noise is rounded to float16 first, so that the same noise is denoised, scored and stored.
        rng = stream_rng(config.seed, Stream.COLLECTED_NOISE, shard)
        seeds, denoise_seeds = rng.integers(2**62, size=batch), rng.integers(2**31, size=batch)
        if config.same_noise:
            own = stream_rng(config.seed, Stream.SHARED_NOISE).integers(2**62, size=k)
            seeds = np.tile(own, config.prompts_per_shard)  # in the order of `repeated`
        text, mask = (x.to(state.device) for x in envs.begin(denoise_seeds.tolist(), padded))  # (B, L, D), (B, L)
        outcome = envs.play(policy.sample(text, mask, seeds=seeds.tolist()).patches.half().float())
        with torch.no_grad():
            log_prob = policy.log_prob(outcome.patches, text, mask).cpu().numpy()  # (B, N)

        rows = {
            "prompt": padded,
            "seed": seeds.tolist(),
            "denoise_seed": envs.denoise_seeds,
            "noise": list(outcome.noise.flatten(1).half().cpu().numpy()),
            "log_prob": list(log_prob),
            "reward": outcome.rewards.tolist(),
        }
        rows |= {key: values.tolist() for key, values in outcome.scores.items()}
        if config.save_images and envs.images is not None:
            whole = envs.images.isfinite().flatten(1).all(1)  # others have a reward of NaN, and no picture
            rows["image"] = [
                {"bytes": _png(image), "path": None} if good else None
                for image, good in zip(envs.images, whole, strict=True)
            ]
        write_shard(config.output_dir, shard, {key: part[: len(repeated)] for key, part in rows.items()}, features)
    bar.close()
    envs.close()
    barrier()


def _png(image: torch.Tensor) -> bytes:
    file = io.BytesIO()
    save_png(image, file)
    return file.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(CollectConfig, argv, __doc__)
    collect(config)
    if not is_main():
        return
    rollouts = load_rollouts(config.output_dir)
    rewards, prompts = rollouts.rewards, np.array(rollouts.prompts)
    starts = np.flatnonzero(np.r_[True, prompts[1:] != prompts[:-1]])  # rows of a prompt are contiguous
    best, worst = np.maximum.reduceat(rewards, starts), np.minimum.reduceat(rewards, starts)
    print(
        f"{rewards.size} rollouts of {len(starts)} prompts in {config.output_dir}; mean reward {rewards.mean():.3f}, "
        f"best per prompt {best.mean():.3f}, best minus worst {(best - worst).mean():.3f}; dropped {rollouts.dropped}"
    )


if __name__ == "__main__":
    run_script(main)
