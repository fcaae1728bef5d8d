"""Samplers: ways to choose the initial noise, from a Gaussian draw to a policy to the best of several.

The picture of a prompt and a seed follows from these two alone, in any batch. Samplers compose: what takes a
sampler takes any, so that "policy + best of 4" is ``BestOf(PolicySampler(denoiser, policy), 4, reward)``. Searches
around a noise are in :mod:`noisear_rl.samplers.search`, gradients to it in :mod:`noisear_rl.samplers.reno`.

Shapes: ``B`` samples, noise ``(B, C, h, w)``, images ``(B, 3, H, W)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from noisear_rl.rewards import WeightedReward

__all__ = [
    "Incumbent",
    "Sampler",
    "Samples",
    "check_choice",
    "check_seeds",
    "derived_seeds",
]


@dataclass
class Samples:
    """What a sampler returns.

    Attributes:
        noise: ``(B, C, h, w)`` float32, what the pictures were denoised from.
        images: ``(B, 3, H, W)`` float32 in [0, 1].
        nfe: Network evaluations of the denoiser an image, those of choosing or searching included.
        kl_to_gaussian: ``(B,)`` closed-form KL of the noise's distribution to N(0, I) in nats, along the noise that was
            drawn; ``None`` where the noise has no known density.
    """

    noise: torch.Tensor
    images: torch.Tensor
    nfe: float
    kl_to_gaussian: torch.Tensor | None


class Sampler(Protocol):
    """A way to choose the initial noise, with everything it needs bound at construction."""

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], *, denoising_seeds: Sequence[int] | None = None
    ) -> Samples:
        """Chooses noise and denoises it.

        Args:
            prompts: ``B`` texts.
            seeds: ``B``; a sample depends on its own prompt and seed alone.
            denoising_seeds: ``B`` seeds of what the denoiser draws itself; ``None`` for ``seeds``. A choice among
                noises keeps it, so that candidates differ by their noise only.

        Raises:
            ValueError: If there are not as many seeds as prompts.
        """
        ...


def derived_seeds(seeds: Sequence[int], *index: int) -> list[int]:
    """One more seed in [0, 2⁶³) for each, independent of those of other indices (which count from 1) and seeds."""
    words = [np.random.SeedSequence([int(seed), *index]).generate_state(1, np.uint64)[0] for seed in seeds]
    return [int(word >> 1) for word in words]


@dataclass
class Incumbent:
    """The best noise so far of each of ``B`` samples, with its picture and its score ``(B,)``.

    A picture that a scorer failed on loses to any other.
    """

    noise: torch.Tensor
    images: torch.Tensor
    scores: torch.Tensor

    def __post_init__(self) -> None:
        self.scores = _ranked(self.scores)

    def challenge(self, noise: torch.Tensor, images: torch.Tensor, scores: torch.Tensor) -> None:
        """Replaces the samples whose challenger scores higher; in a tie the earlier one stays."""
        better = (_ranked(scores) > self.scores)[:, None, None, None]
        self.noise = torch.where(better.to(noise.device), noise, self.noise)
        self.images = torch.where(better.to(images.device), images, self.images)
        self.scores = torch.maximum(_ranked(scores), self.scores)


def check_choice(reward: WeightedReward) -> None:
    """Refuses a reward that cannot choose between pictures.

    Raises:
        ValueError: If a score depends on the pictures that were scored before.
    """
    if reward.normalize == "running":
        raise ValueError(
            "a reward that is standardised by running statistics scores a picture by those before it, so that the "
            "choice would not follow from prompt and seed: set its normalize to 'none' or 'fixed'"
        )


def _ranked(scores: torch.Tensor) -> torch.Tensor:
    return torch.where(scores.isfinite(), scores, -torch.inf)


def check_seeds(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises ``ValueError`` unless there is one seed a prompt."""
    if len(prompts) != len(seeds):
        raise ValueError(f"expected one seed a prompt, got {len(seeds)} seeds for {len(prompts)} prompts")
