"""Whether a run that is resumed is still the same: its algorithm, its options, and the files that they name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from noisear_rl.config import to_mapping
from noisear_rl.files import sha256
from noisear_rl.integrity import DamagedError
from noisear_rl.rewards import reward_sha256

CONFIG, INPUTS = "config.yaml", "inputs.json"
# These do not change what an update does.
MAY_CHANGE: tuple[str, ...] = ("updates", "save_every", "keep_checkpoints", "log_every", "micro_batches", "patience")
MAY_CHANGE += ("rounds", "output_dir", "resume", "wandb", "reward_device", "compile")
MAY_CHANGE += ("pairs", "rollouts")  # their content is compared
MEMORY: tuple[str, ...] = (
    "device",
    "micro_batch_size",
    "cache_dir",
    "offload",
    "device_map",
    "drop_text_encoders",
    "compile",
)
MEMORY += ("vae_slicing", "attention_slicing")
MAY_CHANGE += tuple(f"denoiser_options.{name}" for name in MEMORY)


def inputs_of(config: Any) -> dict[str, Any]:
    """What a run depends on besides its options: the algorithm, and checksums of the files that options name."""
    found: dict[str, Any] = {"algorithm": type(config).__name__.removesuffix("Config")}
    if (reward := getattr(config, "reward", None)) and (checksum := reward_sha256(reward)):
        found["reward"] = checksum
    prompts = getattr(config, "prompts", None)
    if isinstance(prompts, str) and len(prompts) < 1000 and Path(prompts).is_file():
        found["prompts"] = sha256(Path(prompts))
    for name in ("pairs", "rollouts"):
        given = getattr(config, name, None) or ()
        folders = given if isinstance(given, tuple) else (given,)
        manifests = [manifest for folder in folders if (manifest := Path(folder) / "manifest.json").is_file()]
        if manifests:  # of several folders, in their order
            found[name] = " ".join(map(sha256, manifests))
    return found


def check_same_run(checkpoint: Path, config: Any, may_change: Collection[str] = ()) -> None:
    """Refuses to go on from a checkpoint with another algorithm, other options or other files.

    Args:
        checkpoint: Of a run folder. Those of earlier versions lack some of it, which is not compared.
        config: The options to go on with.
        may_change: Options that may differ besides :data:`MAY_CHANGE`.

    Raises:
        ValueError: If something differs; names all of it.
        DamagedError: If what the checkpoint says of itself cannot be read.
    """
    allowed, differ = {*MAY_CHANGE, *may_change}, []
    known, asked = _read(checkpoint / INPUTS, json.loads), inputs_of(config)
    if known.get("algorithm", asked["algorithm"]) != asked["algorithm"]:
        raise ValueError(
            f"{checkpoint} is of a run of {known['algorithm']}, not {asked['algorithm']}: choose another --output-dir, "
            "and --init-from that policy"
        )
    saved, given = _flat(_read(checkpoint / CONFIG, yaml.safe_load)), _flat(to_mapping(config))
    for name in given:
        if name in saved and saved[name] != given[name] and name not in allowed:
            differ.append(f"{name} was {saved[name]!r:.80}, not {given[name]!r:.80}")
    for name in known.keys() & asked.keys():
        if known[name] != asked[name] and not any(text.startswith(f"{name} was") for text in differ):
            differ.append(f"the content of {name}: {getattr(config, name)} has changed")
    if differ:
        raise ValueError(
            f"{checkpoint} is of a run with other options: {'; '.join(differ)}. Pass the same ones to resume it, or "
            f"choose another --output-dir. Only these may change: {', '.join(sorted(allowed))}"
        )


def _read(path: Path, read: Any) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(read(path.read_text(encoding="utf-8")) or {})
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise DamagedError(f"{path}: damaged: remove the checkpoint to go on from the one before") from error


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted names."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
