"""Images as data URIs: small ones unchanged, large ones scaled down uniformly until all of them fit."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_BYTES = 10_000_000  # 13.4 MB in base64, which leaves more than 1 MB of 15 for the text
SMALL = 128  # pixels; images up to this size stay unchanged
# Longest side in pixels and WebP quality; the best pair at which all images fit is used for all of them.
LADDER = ((1024, 90), (768, 88), (512, 85), (384, 82), (320, 80), (256, 78), (192, 75), (128, 70), (96, 65), (64, 60))


@dataclass(frozen=True)
class EmbeddedImage:
    """An image inside the page: its data URI and its size in pixels."""

    uri: str
    width: int
    height: int


def embed_image(image: Image.Image, encoding: Literal["PNG", "WEBP"], **options: Any) -> EmbeddedImage:
    """Encodes an image with Pillow; ``options`` are those of the encoding."""
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return EmbeddedImage(f"data:image/{encoding.lower()};base64,{data}", *image.size)


def embed_file(path: Path, side: int, quality: int) -> EmbeddedImage:
    """Encodes an image file as WebP: scaled down to ``side`` pixels, or lossless if it is small.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is not a complete image ({error}): remove it or repeat the evaluation") from error
    if max(image.size) <= min(side, SMALL):
        return embed_image(image, "WEBP", lossless=True)
    image.thumbnail((side, side))
    return embed_image(image, "WEBP", quality=quality, method=2)


def fit_images(paths: Sequence[Path], budget: int = IMAGE_BYTES) -> list[EmbeddedImage]:
    """Encodes images at one size and quality: the best of :data:`LADDER` at which all of them fit.

    Args:
        paths: Image files of any size.
        budget: Bytes for all images together, before base64.

    Raises:
        ValueError: If a file is damaged, or the images do not fit even at the lowest quality.
    """
    characters = budget * 4 / 3
    tried = paths[:: max(1, len(paths) // 8)]
    for side, quality in LADDER:
        size = np.mean([len(embed_file(path, side, quality).uri) for path in tried]) if tried else 0
        if size * len(paths) > 0.95 * characters:
            continue
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda path: embed_file(path, side, quality), paths))  # noqa: B023
        if sum(len(image.uri) for image in images) <= characters:
            return images
    raise ValueError(f"{len(paths)} images do not fit into {budget / 1e6:.0f} MB: choose fewer with --max-images")
