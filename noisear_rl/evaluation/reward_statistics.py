"""Measures scorers on images from Gaussian noise, so that the weights of a reward count standard deviations.

    noisear reward-statistics configs/rewards/paper.yaml --denoiser sdxl --prompts prompts.txt --output reward.yaml

Writes the reward with its statistics and how they were measured. Pass the file to an algorithm as
``--reward reward.yaml``. The statistics depend on the denoiser, its steps and guidance, and the prompts: measure with
the settings of the training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
import yaml

from noisear_rl.command import run_script
from noisear_rl.config import PositiveInt, Seed, check_config, parse_config, to_mapping
from noisear_rl.denoisers import Denoiser, DenoiserName, DenoiserOptions, embed_all, load_denoiser
from noisear_rl.evaluation.compare import evaluate
from noisear_rl.files import write_atomically
from noisear_rl.prompts import resolve_prompts
from noisear_rl.rewards import RewardConfig, RewardSpec, load_reward, reward_config
from noisear_rl.samplers import GAUSSIAN
from noisear_rl.seeds import Stream, stream_rng


@dataclass
class StatisticsConfig:
    """Options of the measurement."""

    reward: tyro.conf.Positional[RewardSpec] = "shapes-match"
    """Scorer or reward file."""
    denoiser: DenoiserName = "shapes"
    """Name or folder of the denoiser."""
    prompts: str | None = None
    """Text file with one prompt per line, or a split of `shapes`; unset for the default of the denoiser."""
    num_prompts: PositiveInt = 100
    """Number of prompts, chosen at random; all if there are fewer."""
    reward_device: str | None = None
    """Device of the scorers, such as `cuda:1` or `cpu`; unset for the accelerator if there is one."""
    samples: PositiveInt = 1
    """Noises per prompt."""
    seed: Seed = 3_000_000
    """First seed of the noises; training and evaluation use other seeds."""
    batch_size: PositiveInt = 16
    """Noises per batch."""
    output: Path = Path("runs/reward.yaml")
    """File to write."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Options of the denoiser, such as `dtype float32` or `path FOLDER`."""

    def __post_init__(self) -> None:
        check_config(self)


def measure(config: StatisticsConfig, denoiser: Denoiser | None = None) -> RewardConfig:
    """Returns the reward with the statistics of Gaussian noise, configured to use them; see the module docstring.

    Raises:
        ValueError: If a scorer returns NaN or infinity, or the same score for every image.
    """
    asked = reward_config(config.reward)
    reward = load_reward(dataclasses.replace(asked, normalize="none"), device=config.reward_device)
    name = denoiser.name if denoiser else config.denoiser
    prompts = list(dict.fromkeys(resolve_prompts(config.prompts, name).prompts))
    reward.check_prompts(prompts)
    denoiser = denoiser or load_denoiser(config.denoiser, **config.denoiser_options)
    order = stream_rng(config.seed, Stream.COLLECTED_PROMPTS).permutation(len(prompts))[: config.num_prompts]
    chosen = [prompts[i] for i in order]
    embed_all(denoiser, chosen)
    results = evaluate(
        denoiser,
        reward,
        {GAUSSIAN: None},
        chosen,
        config.samples,
        seed=config.seed,
        batch_size=config.batch_size,
        keep_images=0,
    )[GAUSSIAN]
    statistics = {}
    for name, scores in results.scores.items():
        mean, std = float(scores.mean()), float(scores.std(ddof=1)) if scores.size > 1 else 0.0
        if not std > 0:
            raise ValueError(
                f"{name} gave {scores.size} images the same score {mean}: there is nothing to learn from it"
            )
        statistics[name] = [round(mean, 6), round(std, 6)]
    measured = {
        "denoiser": denoiser.name,
        "num_inference_steps": denoiser.num_inference_steps,
        "guidance_scale": denoiser.guidance_scale,
        "prompts": len(chosen),
        "samples": config.samples,
        "seed": config.seed,
    }
    return dataclasses.replace(asked, normalize="fixed", statistics=statistics, measured=measured)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(StatisticsConfig, argv, __doc__)
    found = measure(config)
    write_atomically(config.output, yaml.safe_dump(to_mapping(found), sort_keys=False))
    for name, (mean, std) in found.statistics.items():
        print(f"{name}: mean {mean:.4g}, standard deviation {std:.4g} over {found.measured['prompts']} prompts")
    print(f"reward: {config.output}")


if __name__ == "__main__":
    run_script(main)
