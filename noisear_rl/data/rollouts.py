"""Rollouts on disk, and preference pairs from them.

A folder holds Parquet shards, readable by Hugging Face ``datasets``, and a manifest (denoiser, sizes, scorers,
policy). One row is one finished episode: ``prompt``, ``seed`` (of the noise), ``denoise_seed``, ``noise`` (float16,
flattened ``(C, h, w)``), ``log_prob`` (one number a patch, in nats, of exactly this noise), ``reward``,
``reward/<scorer>`` and, by option, ``image``. ``algos/collect.py`` writes them.

Shapes: ``R`` rollouts, ``P`` pairs, ``N`` patches, ``A`` elements a patch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value

from noisear_rl.envs.noise_task import NoiseTask
from noisear_rl.patches import patchify
from noisear_rl.policy.model import NoiseARConfig, NoiseARPolicy
from noisear_rl.data.shards import load_shards, read_manifest
from noisear_rl.learning.run import to_mapping

STRATEGIES = ("best_worst", "all_above_margin")


def rollout_features(scorers: Sequence[str], images: bool) -> Features:
    """Columns of a shard."""
    columns: dict[str, Any] = {"prompt": Value("string"), "seed": Value("int64"), "denoise_seed": Value("int64")}
    columns |= {"noise": List(Value("float16")), "log_prob": List(Value("float32")), "reward": Value("float32")}
    columns |= {f"reward/{name}": Value("float32") for name in scorers}
    return Features(columns | ({"image": Image()} if images else {}))


def policy_sha256(policy: NoiseARPolicy) -> str:
    """Fingerprint of a policy's configuration and weights."""
    digest = hashlib.sha256(json.dumps(to_mapping(policy.config), sort_keys=True).encode())
    for name, value in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def rollout_manifest(task: NoiseTask) -> dict[str, Any]:
    """What rollouts must agree on to be used together."""
    denoiser, statistics = task.denoiser, task.reward.statistics
    return {
        "denoiser": denoiser.name,
        "num_inference_steps": denoiser.num_inference_steps,
        "guidance_scale": denoiser.guidance_scale,
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
        dropped: Rows left out, because a scorer gave NaN or infinity.
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
        """What a policy must agree on with these rollouts."""
        shape, width = tuple(self.manifest["latent_shape"]), self.manifest["text_shape"][1]
        return {"latent_shape": shape, "patch_size": self.manifest["patch_size"], "text_dim": width}

    def check_policy(self, config: NoiseARConfig) -> None:
        """Refuses a policy that these rollouts do not fit.

        Raises:
            ValueError: If latent shape, patch size or text width differ.
        """
        if name := config.size_mismatch(self.policy_sizes):
            raise ValueError(
                f"these rollouts (denoiser {self.manifest['denoiser']!r}) have {name} {self.policy_sizes[name]}, the "
                f"policy has {getattr(config, name)}: collect rollouts with this policy's denoiser and patch size, or "
                "use another policy"
            )


def load_rollouts(folder: str | Path) -> Rollouts:
    """Loads what ``algos/collect.py`` wrote.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If no reward is finite, or the collection was interrupted.
    """
    dataset = load_shards(folder, "rollouts", "python algos/collect.py")
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
        raise ValueError(f"{folder}: not one of {len(good)} rewards is finite: look at the scorers")
    if good.all():
        return Rollouts(dataset, manifest)
    return Rollouts(dataset.select(np.flatnonzero(good)), manifest, int((~good).sum()))


@dataclass
class PreferencePairs:
    """Pairs of rollouts of the same prompt.

    Attributes:
        chosen: ``(P,)`` row numbers of the better rollouts.
        rejected: ``(P,)`` row numbers of the worse ones.
        prompts: How many prompts there were.
        used: How many of them gave a pair.
        ties: Prompts (``best_worst``) or pairs (``all_above_margin``) of equal reward, dropped.
        below: The same for differences above 0 that do not exceed the threshold.
        margin: Mean difference of reward in the pairs.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    prompts: int
    used: int
    ties: int
    below: int
    margin: float

    def __len__(self) -> int:
        return len(self.chosen)

    def __str__(self) -> str:
        return (
            f"{len(self)} pairs from {self.used} of {self.prompts} prompts, mean margin {self.margin:.3f}; "
            f"dropped {self.ties} ties and {self.below} below the threshold"
        )


def preference_pairs(
    rollouts: Rollouts, threshold: float = 0.0, strategy: str = "best_worst", seed: int = 0
) -> PreferencePairs:
    """Pairs within each prompt, never across prompts (NoiseAR, appendix D: best and worst of a prompt).

    Args:
        rollouts: ``R`` rollouts.
        threshold: A pair's rewards must differ by more than this. Ties never make a pair.
        strategy: ``best_worst``: one pair a prompt. ``all_above_margin``: every pair that passes.
        seed: Which of several equally good rollouts stands for its prompt.

    Raises:
        ValueError: If the strategy is unknown, the threshold negative or NaN, or no pair passes; the message
            tells the spread of rewards and suggests a threshold.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; expected one of {STRATEGIES}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    rewards, rng = rollouts.rewards, np.random.default_rng(seed)
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(rollouts.prompts):
        groups.setdefault(prompt, []).append(row)
    chosen: list[int] = []
    rejected: list[int] = []
    spreads, used, ties, below = [], 0, 0, 0
    for rows in groups.values():
        order = rng.permutation(rows)
        order = order[np.argsort(rewards[order], kind="stable")]  # worst first, equals in random order
        spreads.append(float(rewards[order[-1]] - rewards[order[0]]))
        if strategy == "best_worst":
            better, worse = order[-1:], order[:1]
        else:
            low, high = np.triu_indices(len(order), 1)
            better, worse = order[high], order[low]
        difference = rewards[better] - rewards[worse]
        keep = (difference > threshold) & (difference > 0)
        ties += int((difference <= 0).sum())
        below += int(((difference > 0) & ~keep).sum())
        used += bool(keep.any())
        chosen += better[keep].tolist()
        rejected += worse[keep].tolist()
    if not chosen:
        middle, most = float(np.median(spreads)), max(spreads)
        advice = (
            f"try a threshold of {0.5 * middle or 0.5 * most:.3g}"
            if most > 0
            else "all rewards of every prompt are equal: collect more samples a prompt, or use another reward"
        )
        raise ValueError(
            f"no pair differs by more than {threshold}: best minus worst of a prompt is {middle:.3g} in the median "
            f"and {most:.3g} at most, over {len(groups)} prompts; {advice}"
        )
    margin = float((rewards[chosen] - rewards[rejected]).mean())
    return PreferencePairs(np.array(chosen), np.array(rejected), len(groups), used, ties, below, margin)
