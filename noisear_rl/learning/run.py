"""What every training script needs and none should repeat: configuration, run folder, logs, checkpoints.

A run folder holds ``config.yaml`` (the resolved configuration), ``metrics.jsonl`` and TensorBoard files (one
record an update), and ``checkpoints/step-<n>/``: the policy (safetensors), ``state.pt`` (optimiser, schedule,
counters) and the configuration. All randomness of update ``u`` follows from ``(seed, u)``, so a resumed
run equals an uninterrupted one without any saved generator.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shutil
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import tyro
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from noisear_rl.policy.model import NoiseARConfig, NoiseARPolicy

if TYPE_CHECKING:
    from noisear_rl.samplers.npnet.network import NPNet

Config = TypeVar("Config")


def parse_config(cls: type[Config], argv: Sequence[str] | None, description: str | None) -> Config:
    """Reads a dataclass from YAML (``--config FILE``) and the command line, which overrides it.

    Args:
        cls: The dataclass; the docstrings below its fields become ``--help``.
        argv: Arguments; ``None`` for the command line's own.
        description: Text above the options.

    Raises:
        SystemExit: On an unknown or malformed option; the message names the nearest known one.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    default = cls()
    if known.config is not None:
        try:
            default = load_yaml(cls, known.config)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise SystemExit(f"error: {error}") from error
    text = f"{description or ''}\n\n--config FILE.yaml reads presets; options given here override them."
    return tyro.cli(cls, args=rest, default=default, description=text)


def load_yaml(cls: type[Config], path: Path) -> Config:
    """Reads a dataclass from a YAML file.

    Raises:
        ValueError: If a key is unknown (names the nearest one) or the file is no mapping.
        OSError: If the file cannot be read.
    """
    values = yaml.safe_load(Path(path).read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of option names to values")
    return from_mapping(cls, values, str(path))


def from_mapping(cls: type[Config], values: dict[str, Any], where: str = "config") -> Config:
    """Builds a dataclass (nested ones too) from a mapping; unknown keys raise ``ValueError``."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {near!r}?")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            values = values | {key: from_mapping(typing.cast(type, hints[key]), value, f"{where}: {key}")}
        elif isinstance(value, list):
            values = values | {key: tuple(value)}
        elif hints[key] is float and isinstance(value, str):
            values = values | {key: float(value)}  # YAML reads 1e-4 as a string
        elif value is not None and Path in (hints[key], *typing.get_args(hints[key])):
            values = values | {key: Path(value)}
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as plain values that YAML and JSON hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def take_turns(items: Sequence[str], count: int, update: int, seed: int) -> list[str]:
    """The ``count`` items whose turn it is at an update; every round has an order of its own."""
    count = min(count, len(items))
    turn, offset = divmod(update * count, len(items))
    rounds = [np.random.default_rng([seed, 1, turn + i]).permutation(len(items)) for i in (0, 1)]
    return [items[i] for i in np.concatenate(rounds)[offset : offset + count]]


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file through a temporary one, so that a killed process leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@dataclass
class Counters:
    """Where a run stands.

    Attributes:
        step: Updates done.
        images: Pictures denoised for training.
        seconds: Time spent.
        reward_ema: Running mean of rewards, where an algorithm keeps one.
        best: Best held-out figure so far, where an algorithm stops early.
        stale: Evaluations since then.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    reward_ema: float | None = None
    best: float | None = None
    stale: int = 0


class Run:
    """A run folder, its logs and its checkpoints.

    Args:
        folder: The run folder; made if missing.
        config: The resolved configuration, a dataclass.
        resume: Go on from the newest checkpoint. If not, a folder that holds one is refused.
        wandb: Also log to Weights & Biases.

    Raises:
        FileExistsError: If the folder holds a run and ``resume`` is false.
        ValueError: If several processes were launched.
    """

    def __init__(self, folder: Path, config: Any, *, resume: bool = False, wandb: bool = False):
        self.folder, self.config = Path(folder), config
        if self.latest() is not None and not resume:
            raise FileExistsError(f"{folder} holds a run: pass --resume to go on, or choose another --output-dir")
        log_with = ["tensorboard", *(["wandb"] if wandb else [])]
        project = ProjectConfiguration(str(self.folder), logging_dir=str(self.folder / "tensorboard"))
        self.accelerator = Accelerator(log_with=log_with, project_config=project)
        if self.accelerator.num_processes > 1:
            raise ValueError("training runs in one process so far: start it without a distributed launcher")
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))
        self.accelerator.init_trackers("noisear-rl")

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    def log(self, values: dict[str, float], step: int) -> None:
        """Writes one record to TensorBoard and ``metrics.jsonl``."""
        self.accelerator.log(values, step=step)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted((self.folder / "checkpoints").glob("step-*"))
        return found[-1] if found else None

    def save(self, policy: NoiseARPolicy | NPNet, counters: Counters, **parts: Any) -> None:
        """Writes a checkpoint: a temporary folder, then a rename.

        Args:
            policy: The policy, or another network.
            counters: Where the run stands.
            **parts: Objects with ``state_dict``: optimiser, schedule.
        """
        target = self.folder / "checkpoints" / f"step-{counters.step:06d}"
        temporary = target.with_name(f".{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        policy.save_pretrained(temporary)
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"counters": dataclasses.asdict(counters), **state}, temporary / "state.pt")
        (temporary / "config.yaml").write_text(yaml.safe_dump(to_mapping(self.config), sort_keys=False))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)

    def load(self, policy: NoiseARPolicy | NPNet, **parts: Any) -> Counters:
        """Restores the newest checkpoint, if there is one; returns where the run stands."""
        path = self.latest()
        if path is None:
            return Counters()
        saved = type(policy).from_pretrained(str(path))
        if saved.config != policy.config:
            raise ValueError(f"{path} holds a policy of another configuration: {saved.config}, not {policy.config}")
        policy.load_state_dict(saved.state_dict())
        state = torch.load(path / "state.pt", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        counters = Counters(**state["counters"])
        self._forget_after(counters.step)
        return counters

    def _forget_after(self, step: int) -> None:
        """Drops records of updates that a killed run logged but did not save."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            write_atomically(path, "".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Flushes the logs."""
        self.accelerator.end_training()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records that a run logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def load_policy(path: str | Path) -> NoiseARPolicy:
    """Loads a policy in eval mode.

    Args:
        path: A checkpoint, a run folder (its newest checkpoint), a Hub id, or a ``.pth`` file of the authors' network
            (:meth:`~noisear_rl.policy.NoiseARPolicy.from_reference`).

    Raises:
        FileNotFoundError: If a folder holds no policy.
        ValueError: If the weights are truncated or of another architecture.
    """
    if Path(path).suffix == ".pth":
        return NoiseARPolicy.from_reference(path)
    return NoiseARPolicy.from_pretrained(find_checkpoint(path, "policy")).eval()


def find_checkpoint(path: str | Path, what: str) -> str:
    """The folder of a checkpoint, of a run folder's newest one, or a Hub id, as ``from_pretrained`` takes it.

    Args:
        path: Any of these.
        what: What it must hold, for the message.

    Raises:
        FileNotFoundError: If a folder holds no weights, or there is none and no Hub id looks like this.
    """
    folder = Path(path)
    if folder.is_dir():
        runs = sorted(folder.glob("checkpoints/step-*"))
        folder = runs[-1] if runs else folder
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"{path} holds no {what}: expected config.json and model.safetensors")
    elif folder.is_absolute() or str(path).count("/") != 1 or folder.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected a checkpoint, a run folder or a Hub id (owner/name)")
    return str(folder)


def initial_policy(path: str | None, config: NoiseARConfig) -> NoiseARPolicy:
    """What training starts from, in eval mode: :func:`load_policy` where a path is given, else a fresh policy."""
    return load_policy(path) if path else NoiseARPolicy(config).eval()
