"""Samplers: ways to choose the initial noise, from a Gaussian draw to a policy to the best of several.

A prompt and a seed alone determine the image, in any batch. Samplers compose: whatever takes a sampler takes any
sampler, so "policy + best of 4" is ``BestOf(PolicySampler(denoiser, policy), 4, reward)``. Search in the neighbourhood
of a noise is in :mod:`noisear_rl.samplers.search`, gradient ascent on it in :mod:`noisear_rl.samplers.reno`.

Shapes: ``B`` samples, noise ``(B, C, h, w)``, images ``(B, 3, H, W)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from noisear_rl.denoisers import Denoiser
from noisear_rl.patches import per_row
from noisear_rl.rewards import WeightedReward

__all__ = [
    "DrawingSampler",
    "Incumbent",
    "Sampler",
    "Samples",
    "check_choice",
    "check_seeds",
    "derived_seeds",
    "resolve_denoising_seeds",
]


@dataclass
class Samples:
    """The result of a sampler.

    Attributes:
        noise: ``(B, C, h, w)`` float32, the noise that was denoised. Samplers never clip it, whereas the environments
            clip every action at ±10 (:data:`~noisear_rl.envs.noise_task.ACTION_BOUND`).
        images: ``(B, 3, H, W)`` float32 in [0, 1].
        nfe: Network evaluations of the denoiser per image, including those spent on a choice or a search.
        kl_to_gaussian: ``(B,)`` closed-form KL of the noise's distribution to N(0, I) in nats, along ``noise``;
            ``None`` if the noise has no known density.
    """

    noise: torch.Tensor
    images: torch.Tensor
    nfe: float
    kl_to_gaussian: torch.Tensor | None


class Sampler(Protocol):
    """A way to choose the initial noise; its dependencies are bound at construction."""

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], *, denoising_seeds: Sequence[int] | None = None
    ) -> Samples:
        """Chooses noise and denoises it.

        Args:
            prompts: ``B`` prompts.
            seeds: ``B`` seeds; a sample depends only on its own prompt and seed.
            denoising_seeds: ``B`` seeds of the noise that the denoiser itself draws; ``None`` to derive them from
                ``seeds`` (:func:`resolve_denoising_seeds`). A choice among noises keeps them fixed, so that candidates
                differ only in their noise.

        Raises:
            ValueError: If the numbers of seeds and prompts differ.
        """
        ...


class DrawingSampler(ABC):
    """A sampler that denoises what it draws, once per sample: a subclass has a denoiser and defines :meth:`draw`."""

    denoiser: Denoiser

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], *, denoising_seeds: Sequence[int] | None = None
    ) -> Samples:
        """See :class:`Sampler`; ``nfe`` counts only the denoiser's evaluations."""
        noise, kl = self.draw(prompts, seeds)
        own = resolve_denoising_seeds(seeds, denoising_seeds)
        images = self.denoiser.denoise(noise, self.denoiser.encode(prompts), own)
        return Samples(noise, images, self.denoiser.nfe, kl)

    @abstractmethod
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Noise ``(B, C, h, w)`` and its KL to N(0, I) ``(B,)`` if there is one, without denoising."""


def derived_seeds(seeds: Sequence[int], *index: int) -> list[int]:
    """Derives one seed in [0, 2⁶³) per seed, independent across seeds and indices (candidates count from 1)."""
    words = [np.random.SeedSequence([int(seed), *index]).generate_state(1, np.uint64)[0] for seed in seeds]
    return [int(word >> 1) for word in words]


def resolve_denoising_seeds(seeds: Sequence[int], denoising_seeds: Sequence[int] | None = None) -> Sequence[int]:
    """The given denoising seeds, or by default one derived from each noise seed.

    With the noise's own seed, the first draw of a stochastic scheduler would equal the initial noise. The index is 0,
    which no candidate has.
    """
    return derived_seeds(seeds, 0) if denoising_seeds is None else denoising_seeds


@dataclass
class Incumbent:
    """The best noise so far of each of ``B`` samples, with its image and its score ``(B,)``.

    An image without a finite score loses to any other.
    """

    noise: torch.Tensor
    images: torch.Tensor
    scores: torch.Tensor

    def __post_init__(self) -> None:
        self.scores = _ranked(self.scores)

    def challenge(self, noise: torch.Tensor, images: torch.Tensor, scores: torch.Tensor) -> None:
        """Replaces the samples whose challenger scores higher; a tie keeps the earlier one."""
        better = _ranked(scores) > self.scores
        self.noise = torch.where(per_row(better, noise), noise, self.noise)
        self.images = torch.where(per_row(better, images), images, self.images)
        self.scores = torch.maximum(_ranked(scores), self.scores)


def check_choice(reward: WeightedReward) -> None:
    """Rejects a reward that cannot choose between images.

    Raises:
        ValueError: If a score depends on previously scored images.
    """
    if reward.normalize == "running":
        raise ValueError(
            "a reward standardised by running statistics depends on previously scored images, so the choice would not "
            "follow from prompt and seed: set its normalize to 'none' or 'fixed'"
        )


def _ranked(scores: torch.Tensor) -> torch.Tensor:
    return torch.where(scores.isfinite(), scores, -torch.inf)


def check_seeds(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises ``ValueError`` unless there is one seed per prompt."""
    if len(prompts) != len(seeds):
        raise ValueError(f"expected one seed per prompt, got {len(seeds)} seeds for {len(prompts)} prompts")
