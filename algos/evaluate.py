"""Compares policies with Gaussian noise at equal cost: same prompts, same seeds, a held-out judge, intervals.

    python algos/evaluate.py --policies reinforce=runs/reinforce nll=runs/nll --prompts held_out

Prints a table by category with 95 % intervals and writes ``results.json`` and ``table.md``.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from noisear_rl.denoisers import EMBEDDED, load_denoiser
from noisear_rl.denoisers.shapes.captions import SPLITS, balanced_captions, parse_caption
from noisear_rl.envs.noise_task import load_prompts
from noisear_rl.evaluation import GAUSSIAN, MethodScores, evaluate, table
from noisear_rl.policy import NoiseARPolicy
from noisear_rl.rewards import load_reward
from noisear_rl.training import load_policy, parse_config, to_mapping, write_atomically


@dataclass
class EvaluateConfig:
    """Options of evaluation."""

    policies: tuple[str, ...] = ()
    """Methods as NAME=PATH: checkpoints, run folders or Hub ids. Gaussian noise is always compared."""
    denoiser: str = "shapes"
    """Denoiser's name or folder."""
    prompts: str | None = "held_out"
    """A split of `shapes` (drawn with equal shares of the categories), or a text file with a prompt a line."""
    num_prompts: int = 120
    """How many captions of a split; files are used whole."""
    samples: int = 8
    """Noises a prompt."""
    scorers: tuple[str, ...] = ("shapes-exact", "shapes-match", "shapes-clip")
    """Scorers; the first one makes the table and must not have been trained on."""
    resample: str = "prompts"
    """Intervals for new `prompts` like these, or for new `noise` on these very prompts."""
    seed: int = 1_000_000
    """First seed of the noises; training uses others."""
    batch_size: int = 64
    """Noises at once."""
    output_dir: Path = Path("runs/evaluate")
    """Where `table.md` and `results.json` go."""
    denoiser_options: dict[str, str] = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32`."""


def categories_of(prompts: Sequence[str]) -> list[str]:
    """GenEval category of every prompt; ``all`` for prompts outside the shapes world."""
    names = []
    for prompt in prompts:
        try:
            names.append(parse_caption(prompt).category)
        except ValueError:
            names.append("all")
    return names


def provenance() -> dict[str, str | int]:
    """Commit, versions and hardware of this run."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"commit": commit, "torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}


def summary(results: dict[str, MethodScores], prompts: Sequence[str]) -> dict:
    """Everything but the images, as plain values."""
    methods = {}
    for name, result in results.items():
        methods[name] = {
            "scores": {scorer: values.round(4).tolist() for scorer, values in result.scores.items()},
            "kl_to_gaussian": result.kl_to_gaussian,
            "noise_mean": result.noise_mean,
            "noise_std": result.noise_std,
            "nfe": result.nfe,
            "seconds_per_image": result.seconds_per_image,
        }
    return {"prompts": list(prompts), "methods": methods}


def run(config: EvaluateConfig) -> str:
    """Evaluates and returns the table; see the module's docstring."""
    policies: dict[str, NoiseARPolicy | None] = {GAUSSIAN: None}
    for item in config.policies:
        name, _, path = item.partition("=")
        if not path or name in policies:
            raise ValueError(f"policies must be distinct NAME=PATH items, got {item!r}")
        policies[name] = load_policy(path)
    denoiser = load_denoiser(config.denoiser, **config.denoiser_options)
    if config.denoiser in EMBEDDED and config.prompts in SPLITS:
        prompts = [caption.text for caption in balanced_captions(config.prompts, config.num_prompts)]
    else:
        prompts = load_prompts(config.prompts, denoiser.name)
    reward = load_reward({name: 1.0 for name in config.scorers})
    results = evaluate(
        denoiser, reward, policies, prompts, config.samples, seed=config.seed, batch_size=config.batch_size
    )
    text = table(results, categories_of(prompts), scorer=config.scorers[0], resample=config.resample)
    write_atomically(config.output_dir / "table.md", text + "\n")
    record = {"config": to_mapping(config), "provenance": provenance(), **summary(results, prompts)}
    write_atomically(config.output_dir / "results.json", json.dumps(record))
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(EvaluateConfig, argv, __doc__)
    print(run(config))
    print(f"\nscorer: {config.scorers[0]}, 95 % intervals over {config.resample}; files: {config.output_dir}")


if __name__ == "__main__":
    main()
