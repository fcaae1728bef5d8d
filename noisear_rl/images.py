"""Images as tensors in [0, 1] and as 8-bit pixels."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Image ``(3, H, W)`` in [0, 1] → ``(H, W, 3)`` uint8.

    Raises:
        ValueError: If a pixel is NaN or infinite, which no 8-bit pixel can show.
    """
    if not image.isfinite().all():
        raise ValueError("the image holds NaN or infinite values: try dtype float32, or a smaller guidance_scale")
    return (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as ``(1, 3, H, W)`` float32 in [0, 1]."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255
