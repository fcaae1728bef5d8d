"""Zeroth-order search: a better noise in the neighbourhood of a noise, from rewards alone.

Ma et al. 2025, "Inference-time scaling for diffusion models beyond scaling denoising steps" (arXiv 2501.09732). Their
random search is :class:`~noisear_rl.samplers.BestOf`.

Shapes: ``B`` samples, noise ``(B, C, h, w)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from noisear_rl.denoisers import Denoiser
from noisear_rl.gaussian import standard_noise
from noisear_rl.rewards import WeightedReward
from noisear_rl.samplers.base import (
    Incumbent,
    Sampler,
    Samples,
    check_choice,
    derived_seeds,
    resolve_denoising_seeds,
)


class ZerothOrderSearch:
    """Repeatedly moves a pivot noise to the best of its neighbours.

    ``start`` draws the first pivot. Each iteration denoises ``N`` neighbours of the pivot ``n``,

        y = √(1 - λ²) · n + λ · ε,   ε ~ N(0, I),

    and the best of pivot and neighbours becomes the next pivot. The paper draws neighbours at one distance,
    ``{y : d(y, n) = λ}``, and moves to the best of them. Here a neighbour of N(0, I) noise is again N(0, I) before the
    choice. Its cosine to the pivot is close to ``√(1 - λ²)``, so its distance is close to ``λ√d`` for ``d`` elements
    and small λ; with λ = 1 it is a fresh draw. The pivot stays a candidate, so the reward never falls. Starting from a
    policy's noise, every step leads back towards N(0, I).

    ``nfe`` is the start's plus that of ``iterations · neighbours`` images: with a Gaussian start, a budget of 8 images
    allows ``iterations · neighbours = 7``. On training captions of ``shapes-turbo``, the reward found with that budget
    grows with λ and is highest for λ = 1: random search is hard to beat there.

    Args:
        start: Draws the first pivots.
        denoiser: Frozen diffusion model, the one of ``start``.
        reward: Chooses; it should not be the judge.
        iterations: Number of times the pivot may move.
        neighbours: ``N``, neighbours per iteration.
        step_size: λ in (0, 1].

    Raises:
        ValueError: If an argument is out of range, or the reward is standardised by running statistics.
    """

    def __init__(
        self,
        start: Sampler,
        denoiser: Denoiser,
        reward: WeightedReward,
        *,
        iterations: int = 7,
        neighbours: int = 1,
        step_size: float = 0.7,
    ):
        if iterations < 1 or neighbours < 1:
            raise ValueError(f"iterations and neighbours must be at least 1, got {iterations} and {neighbours}")
        if not 0 < step_size <= 1:
            raise ValueError(f"step_size must be in (0, 1], got {step_size}; 1 draws afresh")
        check_choice(reward)
        self.start, self.denoiser, self.reward = start, denoiser, reward
        self.iterations, self.neighbours, self.step_size = iterations, neighbours, step_size

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], *, denoising_seeds: Sequence[int] | None = None
    ) -> Samples:
        """See :class:`~noisear_rl.samplers.Sampler`; ``kl_to_gaussian`` is ``None``."""
        denoising_seeds = resolve_denoising_seeds(seeds, denoising_seeds)
        first = self.start(prompts, seeds, denoising_seeds=denoising_seeds)
        conditioning = self.denoiser.encode(prompts)
        best = Incumbent(first.noise, first.images, self.reward.score(first.images, prompts))
        keep = (1 - self.step_size**2) ** 0.5
        for i in range(1, self.iterations + 1):
            pivot = best.noise
            for j in range(1, self.neighbours + 1):
                fresh = standard_noise(derived_seeds(seeds, i, j), self.denoiser.latent_shape).to(pivot)
                noise = keep * pivot + self.step_size * fresh
                images = self.denoiser.denoise(noise, conditioning, denoising_seeds)
                best.challenge(noise, images, self.reward.score(images, prompts))
        nfe = first.nfe + self.iterations * self.neighbours * self.denoiser.nfe
        return Samples(best.noise, best.images, nfe, None)
