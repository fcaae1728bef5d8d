"""Images as tensors in [0, 1] and as 8-bit pixels."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageSequence

from noisear_rl.patches import as_frames


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Image ``(3, H, W)`` in [0, 1] → ``(H, W, 3)`` uint8; of a video ``(T, 3, H, W)``, the frame in the middle.

    Raises:
        ValueError: If a pixel is NaN or infinite, which no 8-bit pixel can show.
    """
    if not image.isfinite().all():
        raise ValueError("the image holds NaN or infinite values: try dtype float32, or a smaller guidance_scale")
    if image.dim() == 4:
        image = image[len(image) // 2]
    return (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()


def noise_to_uint8(noise: torch.Tensor, size: int | tuple[int, int]) -> np.ndarray:
    """Noise ``(C, *spatial)`` → ``(H, W, 3)`` uint8: the first three channels, ±3 from black to white.

    Of a video's noise, the frame in the middle; of a signal's, a strip.

    Args:
        noise: Latents of one image.
        size: Side in pixels, or height and width.
    """
    frames = as_frames(noise)[:, :3]  # (T, C, h, w)
    frame = frames[len(frames) // 2 :][:1]
    if frame.shape[1] < 3:
        frame = frame[:, :1].expand(-1, 3, -1, -1)
    shown = torch.nn.functional.interpolate(frame, size=(size, size) if isinstance(size, int) else size)[0]
    return to_uint8(((shown + 3) / 6).clamp(0, 1))


def save_png(image: torch.Tensor, file: str | Path | BinaryIO) -> None:
    """Writes an image ``(3, H, W)`` in [0, 1] as PNG, or the frames of a video ``(T, 3, H, W)`` as animated PNG."""
    frames = [Image.fromarray(to_uint8(frame)) for frame in (image if image.dim() == 4 else image[None])]
    frames[0].save(file, format="PNG", save_all=image.dim() == 4, append_images=frames[1:])


def load_png(file: str | Path) -> torch.Tensor:
    """What :func:`save_png` wrote: ``(1, 3, H, W)`` float32 in [0, 1], or ``(1, T, 3, H, W)`` of a video."""
    with Image.open(file) as image:
        frames = torch.cat([to_tensor(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    return frames if len(frames) == 1 else frames[None]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as ``(1, 3, H, W)`` float32 in [0, 1]."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255
