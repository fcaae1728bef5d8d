"""Rollouts on disk.

A folder contains Parquet shards, readable by Hugging Face ``datasets``, and a manifest (denoiser, sizes, scorers,
policy). One row is one finished episode: ``prompt``, ``seed`` (of the noise), ``denoise_seed``, ``noise`` (float16,
flattened ``(C, h, w)``), ``log_prob`` (one number per patch, in nats, of exactly this noise), ``reward``,
``reward/<scorer>`` and optionally ``image``. ``algos/collect.py`` writes them.

Shapes: ``R`` rollouts, ``N`` patches, ``A`` elements per patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value

from noisear_rl.data.shards import load_shards
from noisear_rl.denoisers import dtype_of
from noisear_rl.envs.noise_task import NoiseTask
from noisear_rl.files import read_manifest
from noisear_rl.patches import patchify


def rollout_features(scorers: Sequence[str], images: bool) -> Features:
    """Columns of a shard."""
    columns: dict[str, Any] = {"prompt": Value("string"), "seed": Value("int64"), "denoise_seed": Value("int64")}
    columns |= {"noise": List(Value("float16")), "log_prob": List(Value("float32")), "reward": Value("float32")}
    columns |= {f"reward/{name}": Value("float32") for name in scorers}
    return Features(columns | ({"image": Image()} if images else {}))


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
        return {"latent_shape": shape, "patch_size": self.manifest["patch_size"], "text_dim": width}


def load_rollouts(folder: str | Path) -> Rollouts:
    """Loads what ``algos/collect.py`` wrote.

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
