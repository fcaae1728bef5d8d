"""Noises shared by many prompts: chooses one noise per prompt and writes pairs to pretrain on.

A noise that gives one image a good layout tends to suit similar images too ("golden" seeds: Xu et al. 2024, arXiv
2405.14828). The choice uses prompts that were all tried on the same noises. They share strength by kernel ridge
regression from what the policy reads of a prompt (its words at their places, and pairs of them) to the rewards of every
noise; the ridge is chosen by the rewards of left-out prompts. Prompts of one kind thus get the same layout, which a
Gaussian policy can learn: separate good noises for each prompt have many layouts, whose average has none. This needs
only rewards, no reward gradients.

With a ``margin``, a prompt gets all noises that are nearly as promising as the best one, and the first patch of the
noise decides between them (:mod:`~noisear_rl.policy.layouts`), so that images of one prompt stay different.

Two kinds of targets: the chosen ``noise`` itself, or the ``leak`` of the image that it gives
(:mod:`~noisear_rl.data.signal_leak`): the same layout for a fraction of the KL divergence, if the denoiser's schedule
does not start from pure noise.

    noisear collect --config shapes/collect_same_noise --output-dir runs/tried
    noisear shared-noise --config shapes/shared_noise --rollouts runs/tried
    noisear nll --config shapes/nll_shared_noise --pairs runs/shared

Shapes: ``P`` prompts that were tried, ``Q`` prompts to choose for, ``S`` noises, ``F`` text features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from noisear_rl.command import run_script
from noisear_rl.config import (
    Float,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Share,
    check_config,
    parse_config,
)
from noisear_rl.data.pairs import LAYOUT_FEATURES, PAIR_FEATURES
from noisear_rl.data.rollouts import Rollouts, load_rollouts
from noisear_rl.data.shards import shard_file, write_shard
from noisear_rl.data.signal_leak import signal_leak
from noisear_rl.denoisers import Denoiser, DenoiserOptions, LatentDenoiser, load_denoiser, require
from noisear_rl.distributed import barrier, gather_objects, is_main, process
from noisear_rl.files import check_manifest, sha256
from noisear_rl.integrity import lock_folder
from noisear_rl.prompts import categories_of, resolve_prompts
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.rewards import load_reward, reward_config
from noisear_rl.samplers.shared_noise import Choice, SharedNoises, TextFeatures, choose_noise
from noisear_rl.trust import values_from


@dataclass
class SharedNoiseConfig:
    """Options of the choice."""

    rollouts: Path = Path("runs/rollouts")
    """Folder that `noisear collect --same-noise` wrote."""
    output_dir: Path = Path("runs/shared")
    """Folder for the pairs, one per prompt."""
    prompts: str | tuple[str, ...] | None = None
    """Prompts to choose for, a text file, or a split of `shapes`; unset for the prompts that were tried."""
    num_prompts: PositiveInt | None = None
    """Number of prompts to choose for; a split gives equal shares of its categories, with captions of small categories
    repeated. Unset for all."""
    balance: Fraction = 0.0
    """How far categories of captions are evened out, by repeating the pairs of small ones: 0 keeps their sizes, 1 makes
    them about equal."""
    noises: PositiveInt = 8
    """Number of distinct noises; more of them suit the prompts better but are harder to learn."""
    text_encoder: str = "denoiser"
    """What the choice reads of a prompt, as a policy would: `denoiser`, `tokens`, or an encoder's folder or Hub id."""
    target: Literal["noise", "leak"] = "noise"
    """What the policy learns: the chosen noise, or the leak of the image that it gives."""
    noise_scale: Share = 0.5
    """Standard deviation of fresh noise in a target; with `noise`, the shared noise makes up the rest of the unit
    variance."""
    signal_strength: PositiveFloat = 1.5
    """Leak: factor on the layout's share; 1 is the share that the denoiser saw in training."""
    min_reward: Float = 0.8
    """Leak: minimum reward of an image; other prompts get no pair."""
    tries: PositiveInt = 1
    """Leak: noises to try per prompt at most, the most promising first, until an image is good."""
    margin: NonNegativeFloat = 0.0
    """Expected reward that further noises of a prompt may lack to its best one: more of them keep images of a prompt
    different. With 0, each prompt has one noise."""
    rounds: PositiveInt = 1
    """Leak: images per noise; each image after the first starts from the leak of the last good one."""
    reward_device: str | None = None
    """Leak: device of the scorers, such as `cuda:1`; unset for the accelerator if there is one."""
    batch_size: PositiveInt = 128
    """Leak: prompts per batch."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32` or `path FOLDER`."""

    def __post_init__(self) -> None:
        check_config(self)


def rewards_by_noise(rollouts: Rollouts) -> tuple[list[str], np.ndarray, np.ndarray, list[int]]:
    """Arranges rollouts of ``collect.py --same-noise`` by prompt and noise.

    Returns:
        ``P`` prompts, their rewards ``(P, S)``, the noises ``(S, C·h·w)`` in float32, and their ``S`` seeds.

    Raises:
        ValueError: If the prompts were not tried on the same noises.
    """
    if not rollouts.manifest.get("same_noise"):
        raise ValueError("these rollouts have different noises for every prompt: collect with --same-noise")
    count = rollouts.manifest["samples_per_prompt"]
    prompts = np.array(rollouts.prompts)  # rows of a prompt are contiguous
    _, first, rows = np.unique(prompts, return_index=True, return_counts=True)
    complete = np.sort(first[rows == count])  # skips prompts with an image that a scorer failed on
    if not len(complete):
        raise ValueError("no prompt has a finite reward on every noise: check the scorers")
    drawn = rollouts.dataset.with_format("numpy")[complete[0] : complete[0] + count]
    rewards = rollouts.rewards[complete[:, None] + np.arange(count)]
    return prompts[complete].tolist(), rewards, np.stack(drawn["noise"]).astype(np.float32), drawn["seed"].tolist()


def build_pairs(config: SharedNoiseConfig, denoiser: Denoiser | None = None) -> Choice:
    """Writes up to one pair per prompt in the format of :func:`noisear_rl.data.pairs.build_pairs`; returns the choice.

    ``choice.safetensors`` beside them is a method of ``noisear evaluate`` (:mod:`noisear_rl.samplers.shared_noise`).
    Processes share the images of ``leak``.

    Args:
        config: Options.
        denoiser: Denoiser to use instead of the one named in the rollouts' manifest.

    Raises:
        ValueError: If an option is out of range, the prompts were not tried on the same noises, no image was good
            enough to leak, or the folder contains pairs of other settings.
    """
    check_config(config)
    leak = config.target == "leak"
    process()  # joins the others
    rollouts = load_rollouts(config.rollouts)
    tried, rewards, noise, seeds = rewards_by_noise(rollouts)
    with values_from(config.rollouts / "manifest.json"):  # which may name code
        denoiser = denoiser or load_denoiser(rollouts.manifest["denoiser"], **config.denoiser_options)
    if leak and not require(denoiser, LatentDenoiser, "target: leak").signal_level > 0:
        raise ValueError(f"the schedule of {denoiser.name!r} starts from pure noise: use target: noise")
    prompts = (
        tried[: config.num_prompts]
        if config.prompts is None
        else resolve_prompts(config.prompts, denoiser.name, count=config.num_prompts).prompts
    )
    asked, reader = list(dict.fromkeys(prompts)), PromptReader(config.text_encoder, denoiser)
    reader.embed_all(tried + asked)
    features = TextFeatures(reader, tried)
    choice = choose_noise(rewards, features(tried), features(asked), config.noises)
    own = {
        name: getattr(config, name) for name in ("noises", "noise_scale", "text_encoder", "target", "balance", "margin")
    }
    own["leaked"] = len(asked) * min(config.tries, config.noises) * config.rounds if leak else 0  # images at most
    if leak:
        own |= {name: getattr(config, name) for name in ("signal_strength", "min_reward", "tries", "rounds")}
    _lock = lock_folder(config.output_dir) if is_main() else None
    own |= {"kind": "shared_noise", "asked_sha256": sha256(prompts)}
    if is_main():
        check_manifest(config.output_dir, rollouts.manifest | own)
        chosen = torch.from_numpy(noise[choice.chosen]).unflatten(1, tuple(denoiser.latent_shape))
        weights = torch.from_numpy(choice.weights).float().contiguous()
        SharedNoises(chosen, weights, tried, config.text_encoder, denoiser.name).save(config.output_dir)
    barrier()
    if shard_file(config.output_dir, 0).exists():
        return choice
    if leak:
        leaking = require(denoiser, LatentDenoiser, "target: leak")
        found = _leaks(config, leaking, rollouts.manifest, asked, np.array(seeds)[choice.ranking], choice.predicted)
        if not any(found):
            raise ValueError(f"no image reached min_reward {config.min_reward}: lower it, or use target: noise")
    else:
        targets = ((1 - config.noise_scale**2) ** 0.5 * noise).astype(np.float16)
        enough = choice.predicted > choice.predicted[:, :1] - config.margin
        enough[:, 0] = True
        found = [
            [(int(rank), targets[ranking[rank]]) for rank in ranks.nonzero()[0]]
            for ranking, ranks in zip(choice.ranking, enough, strict=True)
        ]
    times, place = repeats(prompts, config.balance), {column: k for k, column in enumerate(choice.chosen.tolist())}
    rows: dict[str, list[Any]] = {"prompt": [], "seed": [], "target": [], "layout": []}
    for prompt, ranking, kept in zip(asked, choice.ranking, found, strict=True):
        for i, (rank, target) in enumerate(kept):
            column = int(ranking[rank])
            for _ in range(1 if i else times[prompt]):
                for key, value in zip(rows, (prompt, seeds[column], target, place[column]), strict=True):
                    rows[key].append(value)
    barrier()  # all have looked for the shard
    if is_main():
        columns = LAYOUT_FEATURES if config.margin else PAIR_FEATURES
        write_shard(config.output_dir, 0, {key: rows[key] for key in columns}, columns)
    barrier()
    return choice


def repeats(prompts: Sequence[str], balance: float) -> dict[str, int]:
    """How often the pair of each prompt counts: once per time that it is given, more often in small categories.

    Args:
        prompts: Prompts; those outside the embedded world form one category.
        balance: 0 keeps the sizes of the categories, 1 makes them about equal.
    """
    categories = dict(zip(prompts, categories_of(prompts), strict=True))
    sizes = Counter(categories[prompt] for prompt in prompts)
    largest = max(sizes.values())
    return {p: n * round((largest / sizes[categories[p]]) ** balance) for p, n in Counter(prompts).items()}


def _leaks(
    config: SharedNoiseConfig,
    denoiser: LatentDenoiser,
    manifest: dict[str, Any],
    prompts: list[str],
    ranking: np.ndarray,
    predicted: np.ndarray,
) -> list[list[tuple[int, np.ndarray]]]:
    """The leaks of the first noise that gives a good image of each prompt, and of those within the margin of it.

    Args:
        config: Options.
        denoiser: Denoiser that makes the images.
        manifest: The rollouts' manifest, which names the reward.
        prompts: ``Q`` prompts.
        ranking: ``(Q, noises)`` seeds of the noises, the most promising first.
        predicted: ``(Q, noises)`` their expected rewards.

    Returns:
        For each prompt ranks and leaks of the noises that gave a good image, the most promising first.
    """
    with values_from(config.rollouts / "manifest.json"):  # which may name code
        spec = reward_config(manifest.get("reward_spec") or manifest["reward"])
        reward = load_reward(spec, device=config.reward_device)
    leaks: list[list[tuple[int, np.ndarray]]] = [[] for _ in prompts]
    state = process()
    for attempt in range(min(config.tries, config.noises)):
        floor = [predicted[i, kept[0][0]] - config.margin if kept else -np.inf for i, kept in enumerate(leaks)]
        left = [i for i in range(len(prompts)) if predicted[i, attempt] > floor[i]]
        mine = range(0, len(left), config.batch_size)[state.process_index :: state.num_processes]
        found_here: list[tuple[int, np.ndarray]] = []
        for start in tqdm(mine, desc=f"leaks, try {attempt + 1}", unit="batch", disable=not is_main()):
            rows = left[start : start + config.batch_size]
            found = signal_leak(
                denoiser,
                None,  # the first noise is that of the seed: the chosen one
                reward,
                [prompts[i] for i in rows],
                ranking[rows, attempt].tolist(),
                min_reward=config.min_reward,
                signal_strength=config.signal_strength,
                noise_scale=config.noise_scale,
                rounds=config.rounds,
            )
            for j, i in enumerate(rows):
                good = [targets.mean[j] for targets in found if targets.kept[j]]
                if good:
                    found_here.append((i, good[-1].flatten().half().numpy()))
        for i, target in gather_objects(found_here):
            leaks[i].append((attempt, target))
    return leaks


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(SharedNoiseConfig, argv, __doc__)
    choice = build_pairs(config)
    if is_main():
        print(f"{choice}; pairs in {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
