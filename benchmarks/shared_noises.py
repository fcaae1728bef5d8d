"""NLL on noises that serve many captions: what ``ablations.py`` and ``what_works.py`` start from.

Tries 384 captions with the same 128 noises, then trains on the eight noises that serve all captions best, by shipped
presets (``configs/shapes``). Runs go to ``runs/shared_noises``; interrupted runs resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noisear_rl.algos import collect, nll
from noisear_rl.config import load_yaml
from noisear_rl.data import shared_noise

RUNS, PRESETS = Path("runs/shared_noises"), Path(__file__).parents[1] / "configs/shapes"


def policy_folder(seed: int) -> Path:
    """Returns the run folder of the trained policy."""
    return RUNS / f"shared-seed-{seed}"


def run(train: Callable[[Any], Any], cls: type, preset: str, folder: Path, **options: Any) -> None:
    """Runs a shipped preset with some options set; a finished run returns immediately."""
    if "resume" in {field.name for field in dataclasses.fields(cls)}:
        options["resume"] = True
    train(dataclasses.replace(load_yaml(cls, PRESETS / preset), output_dir=folder, **options))


def make_pairs(folder: Path, seed: int, **options: Any) -> Path:
    """Tries captions on the same noises and chooses among them.

    Args:
        folder: Where to write.
        seed: Seed of the captions and noises.
        options: Further options of ``collect``.

    Returns:
        The folder of the pairs.
    """
    run(collect.collect, collect.CollectConfig, "collect_same_noise.yaml", folder / "tried", seed=seed, **options)
    chosen: dict[str, Any] = {"rollouts": folder / "tried"}
    run(shared_noise.build_pairs, shared_noise.SharedNoiseConfig, "shared_noise.yaml", folder / "pairs", **chosen)
    return folder / "pairs"


def pairs_of(seed: int) -> Path:
    """Makes the pairs of a training seed, unless they are there, and returns their folder."""
    return make_pairs(RUNS / f"seed-{seed}", seed)


def train(seed: int) -> None:
    """Trains one seed; a finished run returns immediately."""
    run(nll.train, nll.NLLConfig, "nll_shared_noise.yaml", policy_folder(seed), pairs=pairs_of(seed), seed=seed)
