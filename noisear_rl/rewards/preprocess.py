"""How scorers bring images to the size and scale that their networks were trained with.

Shapes: images of any size ``(B, 3, H, W)`` in [0, 1] or PIL, network input ``(B, 3, size, size)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image

from noisear_rl.images import to_tensor, to_uint8

Order = Literal["torchvision", "transformers", "float", "squash"]


@dataclass(frozen=True)
class Preprocess:
    """Resizes images of any size to ``size`` (bicubic) and standardises each channel.

    The originals differ; ``order`` selects one of their procedures:

    * ``torchvision``: the shorter side to ``size`` and a centre crop, by PIL in the image's own mode; then RGB
      (OpenAI's CLIP, ImageReward);
    * ``transformers``: the same but RGB first; an odd margin is cropped one pixel further up or left
      (``CLIPImageProcessor``: PickScore, MPS);
    * ``float``: RGB first, then the longer side to ``size`` between black bars, in floating-point values that are not
      rounded to 8 bits (HPSv2). Only this one supports ``antialias=False``: PIL always smooths;
    * ``squash``: RGB first, then both sides to ``size``, whatever the shape (``SiglipImageProcessor``).
    """

    order: Order
    size: int = 224
    antialias: bool = True
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def exact(self, images: torch.Tensor | Sequence[Image.Image]) -> torch.Tensor:
        """The original preprocessing, image by image; tensors are rounded to 8 bits, as in a saved file.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], or PIL images of any mode and size.

        Returns:
            ``(B, 3, size, size)`` float32 on the CPU.
        """
        if isinstance(images, torch.Tensor):
            images = [Image.fromarray(to_uint8(image.float())) for image in images.detach()]
        if not images:
            return torch.zeros(0, 3, self.size, self.size)
        return torch.cat([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> torch.Tensor:
        if self.order == "float":
            return self.tensor(to_tensor(image.convert("RGB")))
        if self.order in ("transformers", "squash"):
            image = image.convert("RGB")
        width, height = self.resized(*image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = self.margin(width), self.margin(height)
        image = image.crop((left, top, left + self.size, top + self.size)).convert("RGB")
        return self.standardize(to_tensor(image))

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        """The same for a batch on its own device, differentiable and without rounding to 8 bits.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].

        Returns:
            ``(B, 3, size, size)`` float32.
        """
        height, width = images.shape[2:]
        width, height = self.resized(width, height)
        images = F.interpolate(images.float(), (height, width), mode="bicubic", antialias=self.antialias)
        left, top = self.margin(width), self.margin(height)
        images = F.pad(images, (-left, self.size - width + left, -top, self.size - height + top))  # negative: a crop
        return self.standardize(images if self.order == "float" else images.clamp(0, 1))  # PIL clips, floats overshoot

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """New width and height; the shorter side is ``size`` (for ``float``, the longer side, for ``squash``, both)."""
        if self.order == "squash":
            return self.size, self.size
        if self.order == "float":
            scale = self.size / max(width, height)
            return max(1, round(width * scale)), max(1, round(height * scale))
        short, long = min(width, height), int(self.size * max(width, height) / min(width, height))
        return (self.size, long) if width == short else (long, self.size)

    def margin(self, side: int) -> int:
        """Pixels to crop at the left or top; negative for a black bar."""
        if self.order == "float":
            return -((self.size - side) // 2)
        if self.order == "transformers":
            return (side - self.size) // 2
        return round((side - self.size) / 2)

    def standardize(self, images: torch.Tensor) -> torch.Tensor:
        """Subtracts the channel means and divides by the channel standard deviations."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std
