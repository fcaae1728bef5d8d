"""How much the images of a prompt differ, and how the power of noise is distributed over frequencies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def radial_spectrum(noise: torch.Tensor) -> torch.Tensor:
    """Computes the power of latents by radial frequency, low to high: 1 everywhere for N(0, I).

    Args:
        noise: ``(B, C, h, w)``.

    Returns:
        ``(R,)`` float64, ``R = min(h, w) // 2 + 1`` (of the sides above 1): the mean of ``|FFT|² / (h·w)`` over
        samples, channels, and the frequencies whose distance from zero rounds to ``r``; corners beyond the last ring
        are omitted.
    """
    h, w = noise.shape[-2:]
    power = torch.fft.fft2(noise.double()).abs().square().mean((0, 1)) / (h * w)
    y, x = torch.fft.fftfreq(h, 1 / h), torch.fft.fftfreq(w, 1 / w)
    rings = min((side for side in (h, w) if side > 1), default=1) // 2 + 1
    radius = (y[:, None].square() + x.square()).sqrt().round().long().to(noise.device)
    inside = radius < rings
    total = torch.zeros(rings, dtype=torch.float64, device=noise.device).index_add_(0, radius[inside], power[inside])
    return total / torch.bincount(radius[inside], minlength=rings)


def diversity(images: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """Computes the mean pairwise cosine distance of the images of each prompt.

    Args:
        images: ``(P, K, 3, H, W)`` in [0, 1], ``K`` at least 2.
        embed: Maps images ``(K, 3, H, W)`` to unit vectors ``(K, D)``, such as ``ShapesClip.embed``.

    Returns:
        ``(P,)`` in [0, 2]; 0 if all images look the same to ``embed``.
    """
    k = images.shape[1]
    with torch.no_grad():
        features = torch.stack([embed(part) for part in images]).float()  # (P, K, D)
    cosine = (features @ features.mT).sum((1, 2)) - k  # without the diagonal
    return (1 - cosine / (k * (k - 1))).cpu().numpy()
