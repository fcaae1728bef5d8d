"""Rollouts on disk.

A folder contains Parquet shards, readable by Hugging Face ``datasets``, and a manifest (denoiser, sizes, scorers,
policy). One row is one finished episode: ``prompt``, ``seed`` (of the noise), ``denoise_seed``, ``noise`` (float16,
flattened ``(C, h, w)``), ``log_prob`` (one number per patch, in nats, of exactly this noise), ``reward``,
``reward/<scorer>`` and optionally ``image``. ``noisear collect`` writes them.

Shapes: ``R`` rollouts, ``N`` patches, ``A`` elements per patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from noisear_rl.data.shards import Columns, load_shards
from noisear_rl.denoisers import dtype_of
from noisear_rl.envs.noise_task import NoiseTask
from noisear_rl.files import read_manifest
from noisear_rl.patches import own_patch_size, patchify

if TYPE_CHECKING:
    from datasets import Dataset

IMAGES = 1024  # images decoded at a time


def rollout_features(scorers: Sequence[str], images: bool) -> Columns:
    """Columns of a shard."""
    columns = {"prompt": "string", "seed": "int64", "denoise_seed": "int64"}
    columns |= {"noise": "list<float16>", "log_prob": "list<float32>", "reward": "float32"}
    columns |= {f"reward/{name}": "float32" for name in scorers}
    return columns | ({"image": "image"} if images else {})


def rollout_manifest(task: NoiseTask) -> dict[str, Any]:
    """The properties that rollouts must share to be used together."""
    denoiser, statistics = task.denoiser, task.reward.statistics
    return {
        "denoiser": denoiser.name,
        "num_inference_steps": denoiser.num_inference_steps,
        "guidance_scale": denoiser.guidance_scale,
        "dtype": dtype_of(denoiser),
        "latent_shape": list(denoiser.latent_shape),
        "patch_size": task.patch_size,
        "text_shape": list(denoiser.text_shape),
        "reward": {reward.name: weight for reward, weight in task.reward.rewards},
    } | ({"statistics": {name: list(values) for name, values in statistics.items()}} if statistics else {})


@dataclass
class Rollouts:
    """Rollouts of one folder.

    Attributes:
        dataset: ``R`` rows.
        manifest: How they were collected.
        dropped: Rows left out because a scorer returned NaN or infinity.
    """

    dataset: Dataset
    manifest: dict[str, Any]
    dropped: int = 0

    @property
    def prompts(self) -> list[str]:
        """``R`` prompts."""
        return list(self.dataset["prompt"])

    @property
    def rewards(self) -> np.ndarray:
        """``(R,)``."""
        return np.array(self.dataset["reward"], dtype=np.float32)

    def patches(self) -> torch.Tensor:
        """The noises as patches ``(R, N, A)``, float16."""
        noise = np.stack(self.dataset.with_format("numpy")["noise"][:]).astype(np.float16)
        latents = torch.from_numpy(noise).unflatten(1, self.manifest["latent_shape"])
        return patchify(latents, self.manifest["patch_size"])

    @property
    def policy_sizes(self) -> dict[str, Any]:
        """The sizes that a policy must share with these rollouts."""
        shape, width = tuple(self.manifest["latent_shape"]), self.manifest["text_shape"][1]
        return {"latent_shape": shape, "patch_size": own_patch_size(self.manifest["patch_size"]), "text_dim": width}


@dataclass
class Seen:
    """Noises and what became of them, of several folders of rollouts.

    Attributes:
        denoiser: Name of the denoiser of all.
        prompts: The distinct prompts.
        prompt: ``(R,)`` number of each rollout's prompt.
        group: ``(R,)`` number of each rollout's prompt and folder: noises of one policy for one prompt.
        noise: ``(R, C, *spatial)`` float16.
        rewards: ``(R,)`` float32.
        folders: The folders.
    """

    denoiser: str
    prompts: list[str]
    prompt: np.ndarray
    group: np.ndarray
    noise: np.ndarray
    rewards: np.ndarray
    folders: list[Rollouts]

    def thumbnails(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray | None:
        """Small versions of the images, as 8-bit numbers; ``None`` unless every rollout has its image.

        Args:
            reduce: Maps images ``(b, 3, H, W)`` in [0, 1] to what is kept of them.
        """
        if any("image" not in rollouts.dataset.column_names for rollouts in self.folders):
            return None
        small = []
        for rollouts in self.folders:
            for batch in rollouts.dataset.select_columns("image").iter(IMAGES):
                images = np.stack([np.asarray(image.convert("RGB")) for image in batch["image"]])
                small.append((255 * reduce(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)).round().byte().numpy())
        return np.concatenate(small)


def load_seen(folders: Sequence[Path]) -> Seen:
    """Loads and joins folders of rollouts.

    Raises:
        FileNotFoundError: If a folder contains no rollouts.
        ValueError: If the folders differ in denoiser, reward or a size, or there is none.
    """
    if not folders:
        raise ValueError("rollouts: expected at least one folder")
    loaded = [load_rollouts(folder) for folder in folders]
    for key in ("denoiser", "num_inference_steps", "guidance_scale", "latent_shape", "reward"):
        values = [rollouts.manifest.get(key) for rollouts in loaded]
        if any(value != values[0] for value in values):
            raise ValueError(f"rollouts must agree on {key}: {dict(zip(map(str, folders), values, strict=True))}")
    names = [prompt for rollouts in loaded for prompt in rollouts.prompts]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    shape = loaded[0].manifest["latent_shape"]
    prompt = np.array([number[name] for name in names])
    source = np.repeat(np.arange(len(loaded)), [len(rollouts.dataset) for rollouts in loaded])
    noise = [np.stack(r.dataset.with_format("numpy")["noise"][:]).astype(np.float16) for r in loaded]
    return Seen(
        loaded[0].manifest["denoiser"],
        list(number),
        prompt,
        source * len(number) + prompt,
        np.concatenate(noise).reshape(-1, *shape),
        np.concatenate([rollouts.rewards for rollouts in loaded]),
        loaded,
    )


def check_same_task(rollouts: Rollouts, task: NoiseTask, folder: str | Path) -> None:
    """Refuses rollouts of another denoiser or reward than a training's.

    Args:
        rollouts: What to check.
        task: The training's.
        folder: Where the rollouts are, for the message.

    Raises:
        ValueError: If something differs; names all of it.
    """
    known, asked = rollouts.manifest, rollout_manifest(task)
    differ = [f"{key} {known.get(key)!r}, not {asked[key]!r}" for key in asked if known.get(key) != asked[key]]
    if differ:
        raise ValueError(
            f"{folder} holds rollouts of another denoiser or reward ({'; '.join(differ)}): collect them with this "
            "training's options"
        )


def load_rollouts(folder: str | Path) -> Rollouts:
    """Loads what ``noisear collect`` wrote.

    Raises:
        FileNotFoundError: If the folder contains no rollouts.
        ValueError: If no reward is finite, or the collection was interrupted.
    """
    dataset = load_shards(folder, "rollouts", "noisear collect")
    manifest = read_manifest(folder)
    missing = {"denoiser", "latent_shape", "patch_size", "rollouts"} - manifest.keys()
    if missing or "reward" not in dataset.column_names:
        raise ValueError(f"{folder} holds no rollouts (no {sorted(missing) or 'reward'}): was it made by collect.py?")
    if len(dataset) < manifest["rollouts"]:
        raise ValueError(
            f"{folder}: the collection was interrupted at {len(dataset)} of {manifest['rollouts']} rollouts; "
            "run the same collect command again to finish it"
        )
    good = np.isfinite(np.array(dataset["reward"], dtype=np.float32))
    if not good.any():
        raise ValueError(f"{folder}: none of the {len(good)} rewards is finite: check the scorers")
    if good.all():
        return Rollouts(dataset, manifest)
    return Rollouts(dataset.select(np.flatnonzero(good)), manifest, int((~good).sum()))
