"""What is installed here, which devices and weights there are, and what to do next. Downloads nothing.

Ends with exit code 2 if a requirement is missing or has an unsupported version.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants, try_to_load_from_cache
from packaging.requirements import Requirement

import noisear_rl
from noisear_rl.command import WRONG, run_script, stop
from noisear_rl.config import check_config, parse_config
from noisear_rl.denoisers import EMBEDDED
from noisear_rl.denoisers.placement import resolve_device, resolve_dtype
from noisear_rl.policy.loading import shipped_policies
from noisear_rl.rewards import REWARDS

PACKAGE = "noisear-rl"


@dataclass
class DoctorConfig:
    """The command takes no options."""

    def __post_init__(self) -> None:
        check_config(self)


def requirements() -> Iterator[tuple[str, str, str]]:
    """Per requirement: its name, its version here (``""``: not installed), and what is wrong (``""``: nothing).

    Those of extras count only if they are installed.
    """
    for line in metadata.requires(PACKAGE) or []:
        needed = Requirement(line)
        optional = needed.marker is not None and not needed.marker.evaluate({"extra": ""})
        if optional and needed.marker is not None and needed.marker.evaluate({"extra": "dev"}):
            continue  # for work on the library itself
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            if not optional:
                yield needed.name, "", f"not installed: pip install '{needed.name}{needed.specifier}'"
            continue
        fits = needed.specifier.contains(found, prereleases=True)
        yield needed.name, found, "" if fits else f"pip install '{needed.name}{needed.specifier}'"


def devices() -> list[str]:
    """This machine's accelerators, or its CPU, a line each; the first is what ``device: auto`` stands for."""
    found = torch.accelerator.current_accelerator(check_available=True)
    lines = []
    if found is not None and found.type == "cuda":
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i}  {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    elif found is not None:
        lines.append(str(found.type))
    lines.append(f"cpu  {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    auto = resolve_device("auto")
    dtype = str(resolve_dtype("auto", auto)).removeprefix("torch.")
    return [*lines, f"denoisers and scorers use {auto.type} in {dtype} unless told otherwise (device, dtype)"]


def denoiser_weights() -> dict[str, str]:
    """By denoiser: where its weights are, or how to get them."""
    from noisear_rl.denoisers.presets import PRESETS, cached_folder

    places = {}
    for name, preset in PRESETS.items():
        if name in EMBEDDED:
            places[name] = "comes with the library"
        else:
            folder = cached_folder(name)
            places[name] = f"here: {folder}" if folder else f"not here: fetched from {preset.path} at first use"
    return places


def scorer_weights() -> dict[str, str]:
    """By scorer with published weights: whether they are here, or how to get them."""
    places = {}
    for name, (module, attribute) in REWARDS.items():
        scorer = getattr(importlib.import_module(f"noisear_rl.rewards.{module}"), attribute)
        sources = [getattr(scorer, key) for key in ("source", "head_source") if hasattr(scorer, key)]
        if not sources:
            continue
        if "" in sources:
            places[name] = f"by hand: {scorer.how}"
        else:
            missing = [source for source in sources if not on_disk(source)]
            places[name] = f"not here: fetched from {', '.join(missing)} at first use" if missing else "here"
    return places


def on_disk(source: str) -> bool:
    """Whether weights that are named ``OWNER/REPOSITORY/FILE`` or by a URL are in the caches of this machine."""
    if source.startswith("https://"):
        return (Path(torch.hub.get_dir()) / "checkpoints" / source.rsplit("/", 1)[-1]).is_file()
    owner, repository, file = source.split("/", 2)
    return isinstance(try_to_load_from_cache(f"{owner}/{repository}", file), str)


def _lines(entries: dict[str, str]) -> list[str]:
    return [f"  {name:21}{text}" for name, text in entries.items()]


def report() -> tuple[str, list[str]]:
    """The report, and what is wrong with the installation."""
    found = list(requirements())
    problems = [f"{name} {version}: {wrong}".replace(" :", ":") for name, version, wrong in found if wrong]
    versions = {PACKAGE: noisear_rl.__version__, "python": platform.python_version()}
    versions |= {name: version or "not installed" for name, version, _ in found}
    todo = [f"repair: {problem}" for problem in problems] or [
        "noisear demo                      # the whole loop on the embedded denoiser, five minutes on two CPU cores",
        'noisear sample "a photo of two red squares"      # images of a policy that comes with the library',
        "noisear configs                   # presets for every command",
    ]
    text = "\n".join(
        [
            "Versions",
            *_lines(versions),
            "\nDevices",
            *(f"  {line}" for line in devices()),
            f"\nWeights of denoisers ({constants.HF_HUB_CACHE})",
            *_lines(denoiser_weights()),
            "\nWeights of scorers",
            *_lines(scorer_weights()),
            "\nPolicies that come with the library",
            f"  {', '.join(shipped_policies()) or 'none'}",
            "\nNext",
            *(f"  {line}" for line in todo),
        ]
    )
    return text, problems


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parse_config(DoctorConfig, argv, __doc__)
    text, problems = report()
    print(text)
    if problems:
        stop(f"the installation needs repair: {'; '.join(problems)}", WRONG)


if __name__ == "__main__":
    run_script(main)
