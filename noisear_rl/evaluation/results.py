"""Reads the folder of an evaluation: scores by method, prompt and sample, and the image files.

Shapes: ``P`` prompts, ``S`` samples per prompt.
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
    """Results of one method with one training seed.

    Attributes:
        group: Name shared by the training seeds of one method; tables have one row per group.
        slug: Name of its folder under ``images``.
        scores: ``(P, S)`` by scorer.
        nfe: Network evaluations per image, including those of a search.
        kl_to_gaussian: Mean KL of its noise to N(0, I) in nats; ``None`` for a method without a density.
        noise_mean: Mean over all noise elements.
        noise_std: Standard deviation over all noise elements.
        radial_spectrum: Power by radial frequency, low to high; 1 everywhere for N(0, I).
        noise_map: ``(h, w)``, the mean of the noise over images and channels.
        diversity: ``(P,)`` mean pairwise distance of a prompt's images, by the features that measure it.
        trained: Whether the method was trained.
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
    """Results of an evaluation: every method on the same prompts with the same seeds.

    Attributes:
        folder: Folder of the evaluation.
        prompts: ``P`` prompts.
        categories: ``P`` names; all the same if the prompt set has no categories.
        samples: ``S`` samples per prompt.
        judge: The held-out scorer that decides the comparison.
        methods: Results by method name, the baseline first.
        denoiser: Name of the frozen diffusion model.
        prompt_set: Name or file of the prompts.
        config: Options of the evaluation.
        provenance: Commit, library version and hardware.
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
        """Name of the first method, which the others are compared with."""
        return next(iter(self.methods))

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of the methods by group, in order."""
        groups: dict[str, list[str]] = {}
        for name, method in self.methods.items():
            groups.setdefault(method.group, []).append(name)
        return groups

    def pooled(self, group: str, scorer: str) -> np.ndarray:
        """Returns the scores ``(P, S)`` of a group, averaged over its training seeds."""
        return np.mean([self.methods[name].scores[scorer] for name in self.groups[group]], axis=0)

    def image_path(self, method: str, prompt: int, sample: int) -> Path:
        """Returns the PNG file of one image."""
        return image_file(self.folder, self.methods[method].slug, prompt, sample)

    def seconds_per_image(self) -> dict[str, float]:
        """Returns the time for sampling and denoising by method, without scoring; empty if it was not recorded."""
        path = self.folder / "timing.json"
        return json.loads(path.read_text()) if path.is_file() else {}


def image_file(folder: Path, slug: str, prompt: int, sample: int) -> Path:
    """Returns the file in which an evaluation keeps the image of one prompt and sample."""
    return folder / "images" / slug / f"{prompt:05d}-{sample:02d}.png"


def load_results(folder: str | Path) -> Results:
    """Reads the folder of an evaluation.

    Raises:
        FileNotFoundError: If the folder holds no results.
        ValueError: If ``results.json`` is damaged or has another version.
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
        raise ValueError(f"{path} is damaged or not the result of an evaluation: {error!r}") from error
