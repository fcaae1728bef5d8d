"""Pictures as data URIs: small ones as they are, large ones scaled down alike until all of them fit."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

PICTURE_BYTES = 10_000_000  # 13.4 MB in base64, which leaves more than 1 MB of 15 for the text
SMALL = 128  # pixels; up to here pictures stay as they are
# Longest side in pixels and WebP quality, the best that fits is taken for all pictures alike.
LADDER = ((1024, 90), (768, 88), (512, 85), (384, 82), (320, 80), (256, 78), (192, 75), (128, 70), (96, 65), (64, 60))


@dataclass(frozen=True)
class Picture:
    """A picture inside the page: its data URI and its size in pixels."""

    uri: str
    width: int
    height: int


def to_picture(image: Image.Image, kind: str, **options: object) -> Picture:
    """Encodes an image in a format that Pillow writes, with its options."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{kind.lower()};base64,{data}", *image.size)


def encode_picture(path: Path, side: int, quality: int) -> Picture:
    """A picture file as WebP: scaled down to ``side`` pixels, or lossless where it is small already.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is no whole picture ({error}): run the evaluation again, or remove it") from error
    if max(image.size) <= min(side, SMALL):
        return to_picture(image, "WEBP", lossless=True)
    image.thumbnail((side, side))
    return to_picture(image, "WEBP", quality=quality, method=2)


def fit_pictures(paths: Sequence[Path], budget: int = PICTURE_BYTES) -> list[Picture]:
    """Encodes pictures, all at the same size and quality: the best of :data:`LADDER` at which they fit.

    Args:
        paths: Picture files of any size.
        budget: Bytes for all of them, before base64.

    Raises:
        ValueError: If a file is damaged, or so many do not fit.
    """
    characters = budget * 4 / 3
    tried = paths[:: max(1, len(paths) // 8)]
    for side, quality in LADDER:
        size = np.mean([len(encode_picture(path, side, quality).uri) for path in tried]) if tried else 0
        if size * len(paths) > 0.95 * characters:
            continue
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(lambda path: encode_picture(path, side, quality), paths))  # noqa: B023
        if sum(len(picture.uri) for picture in pictures) <= characters:
            return pictures
    raise ValueError(f"{len(paths)} pictures do not fit into {budget / 1e6:.0f} MB: choose fewer with --max-images")
