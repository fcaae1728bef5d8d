"""Where weights come from: folders, the Hub's cache, or the Hub; and what they are called in records."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, constants, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from noisear_rl.denoisers.quiet import quietly

REACHABLE_WITHIN = 3.0  # seconds to wait for an answer from the Hub


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of a pipeline folder's ``model_index.json``."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} contains no diffusers pipeline: it has no model_index.json")
    return json.loads((folder / "model_index.json").read_text())


def local_folder(name: str, path: str, revision: str | None, variant: str | None) -> Path:
    """The folder of a pipeline: the given one, from the Hub's cache, or downloaded if the Hub can be reached.

    Raises:
        FileNotFoundError: If there is none; the message says which command downloads it and where to put it.
    """
    if Path(path).is_dir():
        read_index(Path(path))
        return Path(path)
    if path.count("/") != 1 or Path(path).is_absolute() or Path(path).parent.is_dir():  # not a Hub id
        raise FileNotFoundError(f"{path}: no such pipeline folder")
    if (found := cached(path, revision, variant)) is not None:
        return found
    download = {"revision": revision, "variant": variant, "use_safetensors": True}
    try:
        HfApi().model_info(path, revision=revision, timeout=REACHABLE_WITHIN)
        with quietly(progress_bars=True):
            return Path(DiffusionPipeline.download(path, **download))
    except Exception as error:  # from many libraries: unreachable, gated, renamed, no disk space
        at = f" --revision {revision}" if revision else ""
        weights = f"*/*.{variant}.safetensors" if variant else "*/*.safetensors"
        raise FileNotFoundError(
            f"the weights of {name!r} ({path}) are not on this machine and could not be fetched. With access to the "
            f"Hub, run `hf download {path}{at} --include '*.json' '*.txt' '*.model' '{weights}'`, which fills "
            f"{constants.HF_HUB_CACHE}; or copy the pipeline to any folder and pass path=FOLDER. The "
            "embedded denoisers 'shapes' and 'shapes-turbo' need no download. "
            f"Cause: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error


def cached(path: str, revision: str | None, variant: str | None) -> Path | None:
    """The folder of a pipeline in the Hub's cache, if it is on this machine."""
    with quietly(), contextlib.suppress(OSError, ValueError):
        options = {"revision": revision, "variant": variant, "use_safetensors": True}
        return Path(DiffusionPipeline.download(path, local_files_only=True, **options))
    return None


def wants_fp16_files(folder: Path, dtype: torch.dtype | None) -> bool:
    """Whether to load the fp16 files: in half precision if there are any, or if there are no others."""
    files = [file.name for file in folder.glob("*/*.safetensors")]
    half = [name for name in files if ".fp16." in name]
    return bool(half) and (dtype in (torch.float16, torch.bfloat16) or len(half) == len(files))


def revision_of(folder: Path) -> str:
    """The Hub's commit, or a digest of the folder's files (for large ones: size, beginning and end)."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for file in sorted(
        path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".model", ".safetensors")
    ):
        digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}".encode())
        _add_contents(digest, file)
    return digest.hexdigest()[:16]


def file_digest(file: Path) -> str:
    """A digest of a large file: beginning and end."""
    digest = hashlib.sha256()
    _add_contents(digest, file)
    return digest.hexdigest()[:16]


def _add_contents(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        digest.update(stream.read(2**20))
        if file.stat().st_size > 2**20:
            stream.seek(-(2**20), 2)
            digest.update(stream.read())


def load_weights(network: torch.nn.Module, file: Path) -> None:
    """Replaces a network's weights by those of a safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file, or of another network.
    """
    if not file.is_file():
        raise FileNotFoundError(f"unet: {file}: no such file")
    try:
        network.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"unet: {file} does not hold this UNet's weights: {str(error).splitlines()[0]}") from error


def lora_file(spec: str) -> Path:
    """A LoRA's file: a path, or ``OWNER/REPOSITORY/FILE`` on the Hub.

    Raises:
        ValueError: If it is no safetensors file.
        FileNotFoundError: If there is no such file.
    """
    if not spec.endswith(".safetensors"):
        raise ValueError(f"lora: {spec!r:.80} is no safetensors file; expected FILE or OWNER/REPOSITORY/FILE")
    owner, _, rest = spec.partition("/")
    repository, _, file = rest.partition("/")
    if Path(spec).exists() or spec.startswith((".", "/", "~")) or not (owner and repository and file):
        return Path(spec)
    return hub_file("lora", f"{owner}/{repository}", file)


def hub_file(option: str, repository: str, file: str) -> Path:
    """A file from the Hub's cache, or downloaded; ``option`` takes a local one.

    Raises:
        FileNotFoundError: If it is not there; the message says which command downloads it.
    """
    with contextlib.suppress(OSError, ValueError):
        return Path(hf_hub_download(repository, file, local_files_only=True))
    try:
        HfApi().model_info(repository, timeout=REACHABLE_WITHIN)
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # as in `local_folder`
        raise FileNotFoundError(
            f"{file} of {repository} is not on this machine and could not be fetched: with access to the Hub, run "
            f"`hf download {repository} {file}`, or pass {option}=FILE. "
            f"Cause: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
