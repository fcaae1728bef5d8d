"""Checkpoints on disk: the one place that finds, checks, reads and writes them.

A run folder holds ``checkpoints/step-<n>/``; a checkpoint holds a network as ``from_pretrained`` takes it
(``config.json``, ``model.safetensors``) and, in a run folder, ``state.pt`` (optimiser, schedule, counters) and the
run's ``config.yaml``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


class Network(Protocol):
    """What a checkpoint is of: any network with the Hub's mixin."""

    def save_pretrained(self, save_directory: Path, /) -> Any:
        """Writes ``config.json`` and ``model.safetensors``."""
        ...


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first."""
    return sorted((Path(folder) / "checkpoints").glob("step-*"))


def find_checkpoint(path: str | Path, what: str) -> str:
    """The folder of a checkpoint, of a run folder's newest one, or a Hub id, as ``from_pretrained`` takes it.

    Args:
        path: Any of these.
        what: What it must hold, for the message.

    Raises:
        FileNotFoundError: If a folder holds no weights, or there is none and ``path`` is no Hub id either.
    """
    folder = Path(path)
    if folder.is_dir():
        folder = [folder, *list_checkpoints(folder)][-1]
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"{path} holds no {what}: expected config.json and model.safetensors")
    elif folder.is_absolute() or str(path).count("/") != 1 or folder.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected a checkpoint, a run folder or a Hub id (owner/name)")
    return str(folder)


def save_checkpoint(
    folder: Path, step: int, network: Network, state: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Writes a checkpoint whole or not at all: a temporary folder, then a rename.

    Args:
        folder: The run folder.
        step: Updates done.
        network: The policy, or another network.
        state: State of everything else, tensors and plain values.
        config: The resolved configuration as plain values.
    """
    target = folder / "checkpoints" / f"step-{step:06d}"
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    network.save_pretrained(temporary)
    torch.save(dict(state), temporary / "state.pt")
    (temporary / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The ``state`` that :func:`save_checkpoint` wrote, on the CPU whatever device it was saved from."""
    return torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu")


def load_weights(network: nn.Module, file: str, device: str, what: str) -> None:
    """Loads a safetensors file into a network.

    Args:
        network: Whose weights they are.
        file: ``model.safetensors`` of a checkpoint.
        device: Where the tensors are read to.
        what: The network's kind and configuration, for the message.

    Raises:
        ValueError: If the file is truncated, or holds the weights of another network.
    """
    try:
        network.load_state_dict(load_file(file, device=device))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file}: truncated, or not the weights of {what}: {error}") from error


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
