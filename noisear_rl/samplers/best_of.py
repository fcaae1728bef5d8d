"""The best of several noises."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from noisear_rl.rewards.weighted import WeightedReward
from noisear_rl.samplers.base import (
    Incumbent,
    Sampler,
    Samples,
    check_choice,
    derived_seeds,
    resolve_denoising_seeds,
)


class BestOf:
    """The best of several noises by a reward: random search in Ma et al. 2025 (arXiv 2501.09732).

    Candidate 0 is the sampler's own sample for the seed; the others use seeds derived from it. The first of equally
    good candidates is chosen. ``nfe`` is ``count`` times the sampler's.

    Args:
        sampler: Draws the candidates.
        count: Candidates per image.
        reward: Chooses by :meth:`~noisear_rl.rewards.WeightedReward.score`; it should not be the judge.

    Raises:
        ValueError: If ``count`` is below 1, or the reward is standardised by running statistics.
    """

    def __init__(self, sampler: Sampler, count: int, reward: WeightedReward):
        if count < 1:
            raise ValueError(f"count must be at least 1 candidate per image, got {count}")
        check_choice(reward)
        self.sampler, self.count, self.reward = sampler, count, reward

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], *, denoising_seeds: Sequence[int] | None = None
    ) -> Samples:
        """See :class:`~noisear_rl.samplers.Sampler`; ``kl_to_gaussian`` is ``None`` if ``count`` exceeds 1."""
        denoising_seeds = resolve_denoising_seeds(seeds, denoising_seeds)
        first = self.sampler(prompts, seeds, denoising_seeds=denoising_seeds)
        if self.count == 1:
            return first
        best = Incumbent(first.noise, first.images, self.reward.score(first.images, prompts))
        nfe = first.nfe
        for j in range(1, self.count):
            candidate = self.sampler(prompts, derived_seeds(seeds, j), denoising_seeds=denoising_seeds)
            best.challenge(candidate.noise, candidate.images, self.reward.score(candidate.images, prompts))
            nfe += candidate.nfe
        return Samples(best.noise, best.images, nfe, None)
