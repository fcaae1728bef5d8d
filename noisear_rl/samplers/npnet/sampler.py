"""Noise from an NPNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from noisear_rl.denoisers import Denoiser
from noisear_rl.gaussian import standard_noise
from noisear_rl.samplers.base import DrawingSampler, check_seeds
from noisear_rl.samplers.npnet.network import NPNet


class NPNetSampler(DrawingSampler):
    """Golden noise, computed from the noise that :class:`~noisear_rl.samplers.GaussianSampler` draws for the same seed.

    Args:
        denoiser: Frozen diffusion model.
        npnet: In eval mode. Moves to the denoiser's device.

    Raises:
        ValueError: If the network was made for another denoiser.
    """

    def __init__(self, denoiser: Denoiser, npnet: NPNet):
        npnet.check_denoiser(denoiser)
        self.denoiser, self.npnet = denoiser, npnet

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[torch.Tensor, None]:
        """Noise ``(B, C, h, w)``, without denoising."""
        check_seeds(prompts, seeds)
        text = self.denoiser.encode(prompts).policy_embeds
        noise = standard_noise(seeds, self.denoiser.latent_shape).to(text.device)
        return self.npnet.to(text.device)(noise, text), None
