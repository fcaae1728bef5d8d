"""Scorers that need no weights: worked examples, and rewards for any denoiser before large scorers are downloaded.

Shapes: ``B`` images ``(B, 3, H, W)`` in [0, 1].
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image

from noisear_rl.images import to_uint8

JPEG_QUALITY = 95


class Brightness:
    """Mean of all pixels, in [0, 1]. Differentiable; the prompt does not matter."""

    name = "brightness"
    statistics = (0.87, 0.033)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores ``(B, 3, H, W)`` images: ``(B,)``."""
        return images.float().mean((1, 2, 3))


class JpegCompressibility:
    """Minus the size in kilobytes as a JPEG of quality 95 (Black et al. 2023, arXiv 2305.13301).

    Smooth images score high. Always below 0: about -2 for an image from `shapes`, minus hundreds for 1024×1024 pixels.
    The prompt does not matter.
    """

    name = "jpeg-compressibility"
    statistics = (-1.87, 0.27)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores ``(B, 3, H, W)`` images: ``(B,)``."""
        sizes = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(to_uint8(image)).save(file, format="JPEG", quality=JPEG_QUALITY)
            sizes.append(-file.tell() / 1000)
        return torch.tensor(sizes, device=images.device)
