"""Published weights of scorers: finding them, reading them without running pickled code, checking names and shapes."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def find_weights(weights: str | Path | None, source: str, how: str) -> Path:
    """Finds the file with the weights of a scorer.

    Args:
        weights: User-supplied file or folder; ``None`` for the published weights.
        source: ``OWNER/REPOSITORY/FILE`` on the Hub, a URL, or "" if the weights cannot be downloaded.
        how: Hint on how to get the file, for the error message.

    Raises:
        FileNotFoundError: If the file does not exist and cannot be downloaded.
    """
    if weights is not None:
        path = Path(weights)
        if path.is_dir():
            path = path / source.rsplit("/", 1)[-1]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file. {how}")
        return path
    if not source:
        raise FileNotFoundError(f"these weights must be passed as a file. {how}")
    try:
        if source.startswith("https://"):
            return _download(source)
        from huggingface_hub import hf_hub_download

        owner, repository, file = source.split("/", 2)
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except Exception as error:  # the Hub, the network and the disk each raise their own types
        raise FileNotFoundError(f"{source} is not on disk and could not be downloaded ({error}). {how}") from error


def _download(address: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / address.rsplit("/", 1)[-1]
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path))  # through a temporary file
    return path


class _Inert:
    """Stands in for the classes and functions of a pickle: keeps their attributes and runs nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Reads named tensors from safetensors, a saved state dict (bare or under ``state_dict``), or a saved module.

    A saved module is a pickle of classes. It is read with ``weights_only``, with an inert holder in place of every
    class and function, so that none of its code runs.

    Raises:
        ValueError: If the file is damaged or contains no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_holder(name), name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or not a file of weights: {error}") from error
    if isinstance(content, _Inert):
        return dict(_tensors_of(content))
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} contains no named weights, only a {type(content).__name__}")
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _holder(name: str) -> type:
    return type(name.rsplit(".", 1)[-1], (_Inert,), {})


def _tensors_of(module: _Inert, prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    own = vars(module)
    volatile = own.get("_non_persistent_buffers_set", ())
    found = [(prefix + name, value) for name, value in own.get("_parameters", {}).items() if value is not None]
    found += [
        (prefix + name, value)
        for name, value in own.get("_buffers", {}).items()
        if value is not None and name not in volatile
    ]
    for name, child in own.get("_modules", {}).items():
        if child is not None:
            found += _tensors_of(child, f"{prefix}{name}.")
    return found


def load_weights(network: torch.nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Loads weights into a network built on the ``meta`` device; all names and shapes must match.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape.
    """
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    problems = [f"{name} is missing" for name in own if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in own]
    problems += [f"{n} is {given[n]}, not {own[n]}" for n in own if n in given and own[n] != given[n]]
    if problems:
        shown = "; ".join(problems[:3])
        raise ValueError(f"these are not the weights of {what}: {shown} ({len(problems)} differences)")
    network.load_state_dict(dict(state), assign=True)
    for module in network.modules():  # the one buffer that transformers does not save
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, torch.Tensor) and ids.is_meta:
            module.position_ids = torch.arange(ids.shape[-1]).expand(ids.shape)
