"""What an evaluation wrote, read back: scores by method, prompt and sample, and where the pictures lie.

Shapes: ``P`` prompts, ``S`` samples a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1


@dataclass
class MethodResult:
    """One method's results.

    Attributes:
        group: Training seeds of one method share it; a row of a table is a group.
        slug: Its folder under ``images``.
        scores: ``(P, S)`` by scorer.
        nfe: Network evaluations an image, those of choosing or searching included.
        kl_to_gaussian: KL of its noise to N(0, I) in nats; ``None`` for a method without a density.
        noise_mean: Mean over all noise elements.
        noise_std: Standard deviation over all noise elements.
        radial_spectrum: Power by radial frequency, low to high; 1 everywhere for N(0, I).
        noise_map: ``(h, w)`` mean over pictures and channels.
        diversity: ``(P,)`` mean pairwise distance of a prompt's pictures, by the scorer whose features measure it.
        trained: Whether a training is behind it.
    """

    group: str
    slug: str
    scores: dict[str, np.ndarray]
    nfe: float
    kl_to_gaussian: float | None
    noise_mean: float
    noise_std: float
    radial_spectrum: np.ndarray
    noise_map: np.ndarray
    diversity: dict[str, np.ndarray] = field(default_factory=dict)
    trained: bool = True


@dataclass
class Results:
    """An evaluation: every method on the same prompts with the same seeds.

    Attributes:
        folder: Where it lies.
        prompts: ``P`` texts.
        categories: ``P`` names; all the same where a prompt set has none.
        samples: ``S``.
        judge: The scorer that decides.
        methods: By name, the baseline first.
        denoiser: Name of the frozen diffusion model.
        prompt_set: Name or file of the prompts.
        config: Every option of the evaluation.
        provenance: Commit, versions and hardware.
    """

    folder: Path
    prompts: list[str]
    categories: list[str]
    samples: int
    judge: str
    methods: dict[str, MethodResult]
    denoiser: str
    prompt_set: str
    config: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def baseline(self) -> str:
        """The first method's name: what the others are compared with."""
        return next(iter(self.methods))

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of methods by group, in order."""
        groups: dict[str, list[str]] = {}
        for name, method in self.methods.items():
            groups.setdefault(method.group, []).append(name)
        return groups

    def pooled(self, group: str, scorer: str) -> np.ndarray:
        """Scores ``(P, S)`` of a group, the mean over its training seeds."""
        return np.mean([self.methods[name].scores[scorer] for name in self.groups[group]], axis=0)

    def image_path(self, method: str, prompt: int, sample: int) -> Path:
        """The PNG of one picture."""
        return picture_path(self.folder, self.methods[method].slug, prompt, sample)

    def seconds_per_image(self) -> dict[str, float]:
        """Sampling and denoising by method, without scoring; empty if it was not kept."""
        path = self.folder / "timing.json"
        return json.loads(path.read_text()) if path.is_file() else {}


def picture_path(folder: Path, slug: str, prompt: int, sample: int) -> Path:
    """Where an evaluation keeps the picture of a prompt's sample."""
    return folder / "images" / slug / f"{prompt:05d}-{sample:02d}.png"


def load_results(folder: str | Path) -> Results:
    """Reads an evaluation's folder.

    Raises:
        FileNotFoundError: If the folder holds no results.
        ValueError: If ``results.json`` is damaged or of another version.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no results.json: run `noisear evaluate --output-dir {folder}` first")
    try:
        record: Mapping[str, Any] = json.loads(path.read_text())
        if record["version"] != VERSION:
            raise ValueError(f"version {record['version']}, expected {VERSION}: run the evaluation again")
        arrays = lambda parts: {name: np.array(values, dtype=float) for name, values in parts.items()}
        methods = {
            name: MethodResult(
                **part
                | {"scores": arrays(part["scores"]), "diversity": arrays(part["diversity"])}
                | {key: np.array(part[key], dtype=float) for key in ("radial_spectrum", "noise_map")}
            )
            for name, part in record["methods"].items()
        }
        rest = {key: value for key, value in record.items() if key not in ("version", "methods")}
        return Results(Path(folder), methods=methods, **rest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no evaluation's: {error!r}") from error
