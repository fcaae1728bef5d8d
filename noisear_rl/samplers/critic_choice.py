"""The best of many noises by a critic: all are drawn, one is denoised."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from noisear_rl.denoisers import Denoiser, policy_sizes
from noisear_rl.gaussian import standard_noise
from noisear_rl.policy.model import NoiseARPolicy
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.samplers.base import Samples, check_seeds, derived_seeds, resolve_denoising_seeds
from noisear_rl.samplers.noise_critic import NoiseCritic


class CriticChoice:
    """Draws ``count`` noises per image and denoises the one of the highest predicted reward.

    The first candidate is the noise that :class:`~noisear_rl.samplers.GaussianSampler` or
    :class:`~noisear_rl.samplers.PolicySampler` draws for the same seed. ``nfe`` counts the denoiser's evaluations
    alone: those of one image.

    Args:
        denoiser: Frozen diffusion model.
        policy: Draws the noises, in eval mode; ``None`` for Gaussian noise.
        critic: Chooses, in eval mode. Moves to the denoiser's device.
        count: Noises per image.

    Raises:
        ValueError: If ``count`` is below 1, or policy or critic were made for another denoiser.
    """

    def __init__(self, denoiser: Denoiser, policy: NoiseARPolicy | None, critic: NoiseCritic, count: int):
        if count < 1:
            raise ValueError(f"count must be at least 1 noise per image, got {count}")
        self.denoiser, self.policy, self.critic, self.count = denoiser, policy, critic, count
        self.read = PromptReader(critic.config.text_encoder, denoiser)
        critic.check_denoiser(denoiser, self.read)
        if policy is not None:
            self.policy_reader = PromptReader(policy.config.text_encoder, denoiser)
            sizes = policy_sizes(denoiser) | self.policy_reader.sizes
            policy.config.check_sizes(sizes, f"denoiser {denoiser.name!r}")

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], *, denoising_seeds: Sequence[int] | None = None
    ) -> Samples:
        """See :class:`~noisear_rl.samplers.Sampler`; ``kl_to_gaussian`` is ``None`` if ``count`` exceeds 1."""
        check_seeds(prompts, seeds)
        conditioning = self.denoiser.encode(prompts)
        text, mask = self.read.read(conditioning)
        critic = self.critic.to(text.device)
        best, highest = torch.empty(0), torch.empty(0)
        for i in range(self.count):
            own = derived_seeds(seeds, i) if i else list(seeds)
            if self.policy is None:
                noise = standard_noise(own, self.denoiser.latent_shape).to(text.device)
            else:
                given = self.policy_reader.read(conditioning)
                noise = self.policy.to(text.device).noise(self.policy.sample(*given, seeds=own))
            predicted = critic(noise, text, mask)[0]
            if i == 0:
                best, highest = noise, predicted
            better = predicted > highest
            best = torch.where(better.view(-1, *[1] * (noise.dim() - 1)), noise, best)
            highest = torch.maximum(predicted, highest)
        images = self.denoiser.denoise(best, conditioning, resolve_denoising_seeds(seeds, denoising_seeds))
        return Samples(best, images, self.denoiser.nfe, None)
