"""The noise that the forward process would have made of a good image: ``√ᾱ·z0 + σ·ε``.

The noise schedule does not end in pure noise, so the layout leaks into the model's input at the first timestep
(Everaert et al. arXiv 2309.15842; Lin et al. arXiv 2305.08891). ``z0`` is the latent of an image that the denoiser made
from a policy's or Gaussian noise and that the reward accepted. This needs only rewards, no reward gradients and no
external images.

Shapes: ``B`` pairs, noise ``(B, C, h, w)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from noisear_rl.denoisers import LatentDenoiser
from noisear_rl.gaussian import standard_noise
from noisear_rl.patches import per_row
from noisear_rl.policy import NoiseARPolicy
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.rewards import WeightedReward
from noisear_rl.samplers.base import resolve_denoising_seeds


class Targets(NamedTuple):
    """Targets of ``B`` pairs.

    Attributes:
        mean: ``(B, C, h, w)``, without their noise.
        kept: ``(B,)``, true for those to keep.
        layout: ``(B,)`` int64, what the policy's first patch chose; ``None`` without a policy that has layouts.
    """

    mean: torch.Tensor
    kept: torch.Tensor
    layout: torch.Tensor | None = None


def signal_leak(
    denoiser: LatentDenoiser,
    policy: NoiseARPolicy | None,
    reward: WeightedReward,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    min_reward: float,
    signal_strength: float,
    noise_scale: float,
    rounds: int,
    reader: PromptReader | None = None,
) -> list[Targets]:
    """Computes the leaks of good images, round by round; each round after the first starts from the last good leak.

    Args:
        denoiser: Denoiser whose schedule leaks.
        policy: Draws the first noise; ``None`` for Gaussian noise.
        reward: Decides which images are good.
        prompts: ``B`` prompts.
        seeds: ``B`` seeds of the noise; denoising seeds are derived from them, the same in every round.
        min_reward: Minimum score of a good image.
        signal_strength: Factor on the layout's share; 1 is the share that the denoiser saw in training.
        noise_scale: Standard deviation of the noise added to a leak.
        rounds: Images per pair.
        reader: Reads the prompts for the policy; ``None`` to make one.

    Returns:
        The targets of every round.
    """
    conditioning = denoiser.encode(prompts)
    if policy is not None:
        reader = reader or PromptReader(policy.config.text_encoder, denoiser)
        text, mask = reader.read(conditioning)
        policy.to(text.device)
    level = signal_strength * denoiser.signal_level
    good = torch.zeros(len(seeds), dtype=torch.bool)  # samples with a good image so far
    mean = torch.zeros(len(seeds), *denoiser.latent_shape)  # leak of the last good image
    layout: torch.Tensor | None = None  # of the noise that an image started from: a good one's stays
    found = []
    for i in range(rounds):
        own = [int(np.random.default_rng([seed, i]).integers(2**31)) if i else seed for seed in seeds]
        fresh = first = standard_noise(own, denoiser.latent_shape)
        if policy is not None:
            sample = policy.sample(text, mask, seeds=own)
            first, drawn = policy.noise(sample).cpu(), policy.chosen_layout(sample.patches, text, mask)
            if drawn is not None:
                layout = drawn.cpu() if layout is None else torch.where(good, layout, drawn.cpu())
        noise = torch.where(per_row(good, first), mean + noise_scale * fresh, first)
        images, latents = denoiser.denoise_with_latents(noise, conditioning, resolve_denoising_seeds(seeds))
        kept = (reward.score(images, prompts) >= min_reward).cpu()
        target = level * latents.cpu()
        found.append(Targets(target, kept, layout))
        mean = torch.where(per_row(kept, mean), target, mean)
        good |= kept
    return found
