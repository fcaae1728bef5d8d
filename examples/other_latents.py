"""Latents that are no images: a signal ``(C, n)`` whose picture is scored, and a video ``(C, t, h, w)``.

Nothing but the denoiser and the reward knows what a latent means; the policy sees patches of it.
"""

from collections.abc import Sequence

import torch
from own_denoiser import OwnDenoiser

from noisear_rl.denoisers import Conditioning


class Signal(OwnDenoiser):
    """Two channels of 32 samples; the image is the signal's spectrogram: 8 windows of 8 samples, 5 frequencies."""

    name, latent_shape, patch_size = "signal", (2, 32), 8

    def denoise(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        spectrum = torch.fft.rfft(noise.mean(1).unfold(1, 8, 4)).abs() / 4  # (B, 7, 5)
        return (1 - (-spectrum).exp()).mT[:, None].expand(-1, 3, -1, -1).contiguous()


class Video(OwnDenoiser):
    """Four latent frames of 8 x 8; every one becomes two of the video's."""

    name, latent_shape, patch_size = "video", (3, 4, 8, 8), (2, 4, 4)

    def denoise(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        return noise.sigmoid().transpose(1, 2).repeat_interleave(2, dim=1)  # (B, 8, 3, 8, 8)
