"""Checkpoints on disk: the one place that finds, checks, reads and writes them.

A run folder holds ``checkpoints/step-<n>/``; a checkpoint holds a network as ``from_pretrained`` takes it
(``config.json``, ``model.safetensors``) and, in a run folder, ``state.pt`` (optimiser, schedule, counters) and the
run's ``config.yaml``.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from noisear_rl.integrity import CHECKSUMS, DamagedError, digest, verify, write_checksums

WEIGHTS, RECORDS = "model.safetensors", "records.json"
_STEP = re.compile(r"step-\d+")


class Network(Protocol):
    """What a checkpoint is of: any network with the Hub's mixin."""

    def save_pretrained(self, save_directory: Path, /) -> Any:
        """Writes ``config.json`` and ``model.safetensors``."""
        ...


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    found = (Path(folder) / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.is_dir() and _STEP.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Updates done at a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def whole_checkpoints(folder: Path) -> Iterator[Path]:
    """The checkpoints of a run folder that are what was written, newest first.

    A damaged one is named in a warning, and renamed to ``damaged-step-…`` once an older whole one is asked for.

    Raises:
        DamagedError: If there are checkpoints, but none is whole.
    """
    errors, damaged = [], []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path, advice="it is not used")
            load_state(path)
            load_file(path / WEIGHTS)
            json.loads((path / "config.json").read_bytes())
        except (OSError, ValueError, RuntimeError, UnpicklingError, EOFError, SafetensorError) as error:
            errors.append(str(error) if isinstance(error, DamagedError) else f"{path}: damaged: {error}")
            damaged.append(path)
            continue
        for error_text, broken in zip(errors, damaged, strict=True):
            warnings.warn(f"{error_text}. Going on from {path.name}", stacklevel=3)
            shutil.rmtree(broken.with_name(f"damaged-{broken.name}"), ignore_errors=True)
            broken.rename(broken.with_name(f"damaged-{broken.name}"))
        errors, damaged = [], []
        yield path
    if errors:
        raise DamagedError(
            f"no checkpoint of {folder} is whole: {'; '.join(errors)}. Restore one from a copy, or choose another "
            "--output-dir to start anew"
        )


def find_checkpoint(path: str | Path, what: str) -> str:
    """The folder of a checkpoint, of a run folder's newest one, or a Hub id, as ``from_pretrained`` takes it.

    Args:
        path: Any of these.
        what: What it must hold, for the message.

    Raises:
        FileNotFoundError: If a folder holds no weights, or there is none and ``path`` is no Hub id either.
        DamagedError: If its files are not what was written.
    """
    folder = Path(path)
    if folder.is_dir():
        folder = [folder, *list_checkpoints(folder)][-1]
        if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{path} holds no {what}: expected config.json and model.safetensors")
        verify(folder, ("config.json", WEIGHTS), advice="use another checkpoint of the run, or resume the run from one")
    elif folder.is_absolute() or str(path).count("/") != 1 or folder.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected a checkpoint, a run folder or a Hub id (owner/name)")
    return str(folder)


def save_checkpoint(
    folder: Path,
    step: int,
    network: Network,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    records: Path | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint whole or not at all: a temporary folder, then a rename.

    Args:
        folder: The run folder.
        step: Updates done.
        network: The policy, or another network.
        state: State of everything else, tensors and plain values.
        config: The resolved configuration as plain values.
        records: The run's log so far, whose checksum is kept.
        inputs: What the run depends on besides its configuration, as plain values.

    Raises:
        OSError: If the disk is full or the folder cannot be written to.
    """
    target = folder / "checkpoints" / f"step-{step:06d}"
    temporary, former = target.with_name(f".{target.name}"), target.with_name(f".former-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        network.save_pretrained(temporary)
        torch.save(dict(state), temporary / "state.pt")
        (temporary / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        (temporary / "inputs.json").write_text(json.dumps(dict(inputs or {}), indent=1) + "\n")
        if records is not None and records.is_file():
            (temporary / RECORDS).write_text(json.dumps(digest(records)) + "\n")
        write_checksums(temporary, {file: file for file in sorted(temporary.iterdir()) if file.is_file()})
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors say that the disk is full
        raise OSError(f"{temporary}: cannot be written: {' '.join(str(error).split()):.200}") from error
    finally:
        if not (temporary / CHECKSUMS).is_file():
            shutil.rmtree(temporary, ignore_errors=True)
    if target.exists():
        target.rename(former)  # put back by recover() if this process is killed right here
    temporary.rename(target)
    shutil.rmtree(former, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finishes or undoes what a process that was killed while it saved a checkpoint left in a run folder."""
    for former in (folder / "checkpoints").glob(".former-step-*"):
        target = former.with_name(former.name.removeprefix(".former-"))
        if not target.exists():
            former.rename(target)
    for left in (folder / "checkpoints").glob(".*step-*"):
        shutil.rmtree(left, ignore_errors=True)


def remove_old(folder: Path, keep: int, scores: Mapping[int, float]) -> None:
    """Removes all checkpoints but the newest ones and the best.

    Args:
        folder: The run folder.
        keep: How many of the newest to keep; 0 keeps all.
        scores: By step, higher is better; a step without one is never the best.
    """
    steps = {step_of(path): path for path in list_checkpoints(folder)}
    best = max((step for step in steps if step in scores), key=lambda step: scores[step], default=None)
    for step in sorted(steps)[: -keep or -len(steps)]:
        if step != best:
            shutil.rmtree(steps[step], ignore_errors=True)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The ``state`` that :func:`save_checkpoint` wrote, on the CPU whatever device it was saved from."""
    file = checkpoint / "state.pt"
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except (UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{file}: damaged, or holds more than tensors and plain values: {error}") from error


def check_finite(network: nn.Module, what: str = "the network") -> None:
    """Refuses a network that cannot be used.

    Args:
        network: Any network.
        what: The network, or its file, for the message.

    Raises:
        ValueError: If a parameter or a buffer is NaN or infinite; names it.
    """
    for name, value in network.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{what} holds NaN or infinite values in {name!r}: use an earlier checkpoint")


def load_weights(network: nn.Module, file: str, device: str, what: str) -> None:
    """Loads a safetensors file into a network.

    Args:
        network: Whose weights they are.
        file: ``model.safetensors`` of a checkpoint.
        device: Where the tensors are read to.
        what: The network's kind and configuration, for the message.

    Raises:
        ValueError: If the file is truncated, holds NaN or infinite weights, or those of another network.
    """
    try:
        network.load_state_dict(load_file(file, device=device))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file}: truncated, or not the weights of {what}: {error}") from error
    check_finite(network, file)


def read_tensors(path: str | Path) -> Any:
    """Contents of a ``.pth`` file; nothing but tensors is unpickled.

    Raises:
        ValueError: If the file is truncated or holds anything but tensors.
        FileNotFoundError: If there is no such file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: truncated, or a pickle of more than tensors, which is not loaded") from error
