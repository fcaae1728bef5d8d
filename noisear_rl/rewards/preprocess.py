"""How scorers bring pictures to the size and scale that their networks were trained with.

Shapes: pictures of any size ``(B, 3, H, W)`` in [0, 1] or PIL, network input ``(B, 3, size, size)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from noisear_rl.images import to_tensor, to_uint8

ORDERS = ("torchvision", "transformers", "float")


@dataclass(frozen=True)
class Preprocess:
    """Pictures of any size to ``size``, bicubic; standardised by channel.

    Originals differ, so ``order`` names whose way it is:

    * ``torchvision``: the shorter side to ``size`` and a centre crop, by PIL in the picture's own mode; then RGB
      (OpenAI's CLIP, ImageReward);
    * ``transformers``: the same with RGB first; an odd margin is cropped one pixel further up or left
      (``CLIPImageProcessor``: PickScore, MPS);
    * ``float``: RGB first, then the longer side to ``size`` between black bars, in floating-point values that are not
      rounded to 8 bits (HPSv2). Only this one may go without ``antialias``: PIL always has it.
    """

    order: str
    size: int = 224
    antialias: bool = True
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def exact(self, pictures: torch.Tensor | Sequence[Image.Image]) -> torch.Tensor:
        """The original's preprocessing, picture by picture; tensors are rounded to 8 bits, as a saved file is.

        Args:
            pictures: ``(B, 3, H, W)`` in [0, 1], or PIL images of any mode and size.

        Returns:
            ``(B, 3, size, size)`` float32 on the CPU.
        """
        if isinstance(pictures, torch.Tensor):
            pictures = [Image.fromarray(to_uint8(picture.float())) for picture in pictures.detach()]
        if not pictures:
            return torch.zeros(0, 3, self.size, self.size)
        return torch.cat([self._one(picture) for picture in pictures])

    def _one(self, picture: Image.Image) -> torch.Tensor:
        if self.order == "float":
            return self.tensor(to_tensor(picture.convert("RGB")))
        if self.order == "transformers":
            picture = picture.convert("RGB")
        width, height = self.resized(*picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = self.margin(width), self.margin(height)
        picture = picture.crop((left, top, left + self.size, top + self.size)).convert("RGB")
        return self.standardize(to_tensor(picture))

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        """The same on a whole batch on its device, differentiable; no rounding to 8 bits on the way.

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
        """Width and height with the shorter side at ``size``, the longer one rounded down; see ``float`` above."""
        if self.order == "float":
            scale = self.size / max(width, height)
            return max(1, round(width * scale)), max(1, round(height * scale))
        short, long = min(width, height), int(self.size * max(width, height) / min(width, height))
        return (self.size, long) if width == short else (long, self.size)

    def margin(self, side: int) -> int:
        """What is cropped at the left or the top of a side; negative for a black bar."""
        if self.order == "float":
            return -((self.size - side) // 2)
        if self.order == "transformers":
            return (side - self.size) // 2
        return round((side - self.size) / 2)

    def standardize(self, images: torch.Tensor) -> torch.Tensor:
        """Subtracts the channels' means and divides by their standard deviations."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std
