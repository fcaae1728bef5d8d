"""Publishes a run folder as a policy that comes with the library, with a card that says how it was trained.

    python -m noisear_rl.report.publishing --run runs/transfer --name ppo --description "PPO on the training captions."
    python -m noisear_rl.report.publishing … --evaluation runs/evaluate    # its table becomes part of the card

``load_policy("shapes/ppo")`` then loads ``noisear_rl/assets/shapes/policies/ppo``: the newest checkpoint of the run, in
float16 if its file exceeds 5 MB.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from noisear_rl import ENVIRONMENTS
from noisear_rl.checkpoints import find_checkpoint, load_state
from noisear_rl.command import run_script
from noisear_rl.config import check_config, parse_config
from noisear_rl.denoisers import load_denoiser
from noisear_rl.files import read_manifest, sha256
from noisear_rl.integrity import verify
from noisear_rl.policy import NoiseARPolicy, load_policy, loading
from noisear_rl.provenance import provenance
from noisear_rl.samplers import as_sampler

LIMIT = 5_000_000  # bytes of weights
TOLERANCE = 1e-3  # relative and absolute, of float16 weights
LOCAL = ("output_dir", "resume", "wandb", "save_every")  # options that do not change the weights
CARD = """---
license: apache-2.0
library_name: noisear-rl
tags: [noise-prior, diffusion, reinforcement-learning]
---
# Policy `{title}`

{description}

It draws the initial noise of the embedded denoisers, and was trained with `{denoiser}`: `load_policy("{title}")`, or
`noisear sample "a photo of two red squares" --policy {title} --denoiser {denoiser}`.

| | |
|---|---|
| updates | {updates:,} |
| images denoised in the last stage | {images:,} |
| seconds of the last stage | {seconds:,.0f} |
| parameters | {parameters:,}, {dtype} |
| SHA-256 of the checkpoint | `{digest}` |
| published at | {provenance} |
{evaluation}
## Training
{stages}
Licence: Apache-2.0.
"""


@dataclass
class PublishConfig:
    """Options of publishing."""

    run: Path = Path("runs/transfer")
    """Run folder of a training; its newest checkpoint is published."""
    name: str = ""
    """Name after `shapes/`, in lower-case letters, digits and hyphens."""
    description: str = ""
    """What the policy is, in one sentence."""
    evaluation: Path | None = None
    """Folder of an evaluation that includes this checkpoint; its table becomes part of the card."""

    def __post_init__(self) -> None:
        check_config(self)


def publish(config: PublishConfig) -> Path:
    """Writes weights, configuration and card; returns their folder. An older policy of the same name is replaced.

    Raises:
        ValueError: If the name is malformed, the description is empty, the policy does not fit the embedded denoisers,
            is too large, or is not the one that was evaluated.
        FileNotFoundError: If ``run`` is not a run folder.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", config.name) or not config.description.strip():
        raise ValueError(f"expected a name like 'ppo' and a description, got {config.name!r}, {config.description!r}")
    if not (config.run / "config.yaml").is_file():
        raise FileNotFoundError(f"{config.run} is not a run folder: it has no config.yaml")
    checkpoint = Path(find_checkpoint(config.run, "policy"))
    weights = checkpoint / "model.safetensors"
    policy, digest = load_policy(checkpoint), sha256(weights)
    as_sampler(load_denoiser("shapes-turbo"), policy)  # fails on a policy of another denoiser

    target = loading.SHIPPED / config.name
    temporary = target.with_name(f".{config.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        dtype = "float32" if weights.stat().st_size <= LIMIT else "float16"
        if dtype == "float32":
            for file in ("config.json", "model.safetensors"):
                shutil.copy(checkpoint / file, temporary)
        else:
            load_policy(checkpoint).half().save_pretrained(temporary)
        size = (temporary / "model.safetensors").stat().st_size
        if size > LIMIT:
            raise ValueError(f"{weights}: {size / 1e6:.1f} MB in {dtype}, more than the {LIMIT / 1e6:g} MB of a policy")
        _check_equal(policy, load_policy(temporary))
        stages, counters = stages_of(config.run), load_state(checkpoint)["counters"]
        card = CARD.format(
            title=loading.FAMILY + config.name,
            description=config.description.strip(),
            denoiser=_denoiser(stages),
            updates=counters["step"],
            images=counters["images"],
            seconds=counters["seconds"],
            parameters=sum(parameter.numel() for parameter in policy.parameters()),
            dtype=dtype,
            digest=digest,
            provenance=listed(provenance()),
            evaluation=evaluation_section(config.evaluation, digest) if config.evaluation else "",
            stages="\n".join(stage_section(name, options) for name, options in stages.items()),
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _check_equal(policy: NoiseARPolicy, published: NoiseARPolicy) -> None:
    """Raises unless the published weights are the policy's up to :data:`TOLERANCE`."""
    loaded = published.state_dict()
    for name, value in policy.state_dict().items():
        if not torch.allclose(value.float(), loaded[name].float(), rtol=TOLERANCE, atol=TOLERANCE):
            raise ValueError(f"{name} does not survive float16: its values differ by more than {TOLERANCE}")


def stages_of(run: Path) -> dict[str, dict[str, Any]]:
    """The configurations of a run and of the runs that it started from, the last stage first, by folder name."""
    found: dict[str, dict[str, Any]] = {}
    folder: Path | None = run
    while folder is not None and (folder / "config.yaml").is_file() and folder.name not in found:
        options = yaml.safe_load((folder / "config.yaml").read_text())
        found[folder.name] = options
        folder = Path(options["init_from"]) if options.get("init_from") else None
    return found


def _denoiser(stages: dict[str, dict[str, Any]]) -> str:
    """The denoiser of the last stage that names one."""
    named = [options.get("denoiser") or ENVIRONMENTS.get(options.get("env_id", "")) for options in stages.values()]
    return next((name for name in named if name), "shapes-turbo")


def stage_section(name: str, options: dict[str, Any]) -> str:
    """One stage of the card: its options as YAML, without those of the machine."""
    shown = {key: without_folders(value) for key, value in options.items() if key not in LOCAL}
    return f"`{name}`:\n\n```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```\n"


def without_folders(value: Any) -> Any:
    """A value of a configuration; of absolute paths, only the last part."""
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def evaluation_section(folder: Path, digest: str) -> str:
    """The section with the table of an evaluation of these weights."""
    manifests = [read_manifest(file.parent) for file in sorted((folder / "noise").glob("*/manifest.json"))]
    names = [manifest["method"] for manifest in manifests if manifest["is"][:1] == [digest]]
    if not names:
        raise ValueError(f"{folder} is not an evaluation of this checkpoint ({digest})")
    advice = "run the same `noisear evaluate` command again"
    verify(folder, ["results.json"], part="results", advice=advice)
    verify(folder, ["table.md"], part="table", advice=advice)
    origin = json.loads((folder / "results.json").read_text())["provenance"]
    table = (folder / "table.md").read_text().strip()
    return f"\n## Evaluation\nThis policy is {', '.join(names)}. {listed(origin)}.\n\n{table}\n"


def listed(values: dict[str, Any]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    print(f"published: {publish(parse_config(PublishConfig, argv, __doc__))}")


if __name__ == "__main__":
    run_script(main)
