"""Noise from N(0, I) and from a policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from noisear_rl.denoisers import Denoiser, policy_sizes
from noisear_rl.gaussian import standard_noise
from noisear_rl.policy.model import NoiseARPolicy
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.samplers.base import DrawingSampler, Sampler, check_seeds

GAUSSIAN = "Gaussian"


def as_sampler(denoiser: Denoiser, method: NoiseARPolicy | Sampler | None) -> Sampler:
    """The sampler of a policy, or Gaussian noise for ``None``; returns a sampler as it is."""
    if method is None:
        return GaussianSampler(denoiser)
    return PolicySampler(denoiser, method) if isinstance(method, NoiseARPolicy) else method


class GaussianSampler(DrawingSampler):
    """Noise from N(0, I), which the denoiser was trained on.

    Args:
        denoiser: Frozen diffusion model.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise ``(B, C, h, w)`` and its KL to N(0, I), without denoising."""
        check_seeds(prompts, seeds)
        return standard_noise(seeds, self.denoiser.latent_shape), torch.zeros(len(seeds))


class PolicySampler(DrawingSampler):
    """Noise from a policy; an untrained policy draws the same noise as :class:`GaussianSampler`.

    The noise is not clipped: outliers beyond ±10, which the environments clip, are denoised as they are, and
    ``kl_to_gaussian`` refers to them.

    Args:
        denoiser: Frozen diffusion model.
        policy: In eval mode. Moves to the denoiser's device.

    Raises:
        ValueError: If the policy was made for another denoiser.
    """

    def __init__(self, denoiser: Denoiser, policy: NoiseARPolicy):
        self.denoiser, self.policy = denoiser, policy
        self.reader = PromptReader(policy.config.text_encoder, denoiser)
        policy.config.check_sizes(policy_sizes(denoiser) | self.reader.sizes, f"denoiser {denoiser.name!r}")

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise ``(B, C, h, w)`` and its KL to N(0, I) ``(B,)``, without denoising."""
        check_seeds(prompts, seeds)
        text, mask = self.reader.read(self.denoiser.encode(prompts))
        policy = self.policy.to(text.device)
        sample = policy.sample(text, mask, seeds=seeds)
        return policy.noise(sample), policy.kl_divergence(sample.patches, text, mask).sum(1)
