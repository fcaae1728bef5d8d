"""Trains a noise prior from rewards alone, in four stages that are also commands of their own.

1. ``tried``: many prompts are tried on the same noises (``noisear collect --same-noise``).
2. ``shared``: one of these noises is chosen for every prompt (``noisear shared-noise``).
3. ``nll``: a policy is pretrained on the chosen noises (``noisear nll``).
4. ``ppo``: PPO improves it (``noisear ppo``).

    noisear train-prior --config shapes/prior --output-dir runs/prior

Every stage writes to a folder of its own in the output folder. Run an interrupted command again to continue; finished
stages return immediately. Several processes share every stage. The policy is in ``ppo``, or in ``nll`` with
``--last nll``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.algos.nll import NLLConfig
from noisear_rl.algos.nll import train as pretrain
from noisear_rl.algos.ppo import PPOConfig
from noisear_rl.algos.ppo import train as improve
from noisear_rl.command import run_script
from noisear_rl.config import Seed, check_config, parse_config
from noisear_rl.data.shared_noise import SharedNoiseConfig, build_pairs
from noisear_rl.distributed import is_main
from noisear_rl.policy import NoiseARPolicy


@dataclass
class PriorConfig:
    """Options of all stages. Each has those of its own command, but for the folders, which are chosen here."""

    output_dir: Path = Path("runs/prior")
    """Folder with one folder per stage."""
    seed: Seed = 0
    """Seed of every stage."""
    last: Literal["nll", "ppo"] = "ppo"
    """Last stage to run; without PPO, the policy is in `nll`."""
    collect: CollectConfig = field(default_factory=CollectConfig)
    """Stage 1; always with the same noises for all prompts."""
    shared_noise: SharedNoiseConfig = field(default_factory=SharedNoiseConfig)
    """Stage 2."""
    nll: NLLConfig = field(default_factory=NLLConfig)
    """Stage 3; its policy is the one that PPO improves."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Stage 4."""

    def __post_init__(self) -> None:
        check_config(self)


def train(config: PriorConfig) -> NoiseARPolicy:
    """Runs the stages that are not finished; returns the last stage's policy.

    Raises:
        ValueError: If an option of a stage is out of range, or a folder holds a stage with other options.
    """
    check_config(config)
    tried, shared, nll, ppo = (config.output_dir / stage for stage in ("tried", "shared", "nll", "ppo"))
    collect(replace(config.collect, output_dir=tried, same_noise=True, seed=config.seed))
    choice = build_pairs(replace(config.shared_noise, rollouts=tried, output_dir=shared))
    if is_main():
        print(f"shared noises: {choice}", flush=True)
    policy = pretrain(replace(config.nll, pairs=shared, output_dir=nll, seed=config.seed, resume=True))
    if config.last == "nll":
        return policy
    return improve(replace(config.ppo, init_from=str(nll), output_dir=ppo, seed=config.seed, resume=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(PriorConfig, argv, __doc__)
    train(config)
    if is_main():
        print(f"policy: {config.output_dir / config.last}")


if __name__ == "__main__":
    run_script(main)
