"""The shapes world: the contents of an image, how it is drawn, and when it matches a caption.

Shapes of tensors: ``B`` images, ``M`` object slots, images are ``(B, 3, 64, 64)`` in [0, 1].
Coordinates are pixels, x to the right and y down; ``(x, y)`` is an object's centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from noisear_rl.denoisers.shapes.captions import (
    COLORS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SIZES,
    Caption,
    CaptionTensors,
    ObjectSpec,
)

IMAGE_SIZE = 64
RADIUS = (6.5, 12.0)  # pixels
RADIUS_OF_SIZE = {"small": (6.5, 7.75), "large": (10.75, 12.0)}  # as drawn
SMALL_BELOW, LARGE_ABOVE = 8.5, 10.0  # as judged
GAP = 3.0  # pixels between the circles around two objects
EXTENT = {"circle": 1.0, "square": 1.2, "triangle": 1.25, "cross": 1.1}  # circumscribed circle / radius
RGB = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.15, 0.65, 0.22),
    "blue": (0.15, 0.30, 0.85),
    "yellow": (0.96, 0.83, 0.12),
    "purple": (0.62, 0.20, 0.72),
    "black": (0.08, 0.08, 0.08),
}
# Unit vectors from the second object to the first, in the order of RELATIONS.
DIRECTIONS = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])


@dataclass
class Scenes:
    """The contents of ``B`` images, as drawn or as detected; empty slots have shape and colour ``-1``.

    Attributes:
        shape: ``(B, M)`` indices into ``SHAPES``.
        color: ``(B, M)`` indices into ``COLORS``.
        center: ``(B, M, 2)`` pixels.
        radius: ``(B, M)`` pixels.
    """

    shape: torch.Tensor
    color: torch.Tensor
    center: torch.Tensor
    radius: torch.Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: torch.Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def count(self) -> torch.Tensor:
        """``(B,)`` number of objects."""
        return (self.shape >= 0).sum(-1)

    def describe(self, i: int) -> list[str]:
        """Names of the objects in image ``i``, for people."""
        pairs = zip(self.color[i].tolist(), self.shape[i].tolist(), strict=True)
        return [f"{COLORS[c]} {SHAPES[s]}" for c, s in pairs if s >= 0]


def sample_scenes(captions: list[Caption], rng: np.random.Generator) -> Scenes:
    """Draws a random scene that matches each caption exactly.

    Colours that a caption leaves open are uniform, radii are uniform in :data:`RADIUS` or in
    :data:`RADIUS_OF_SIZE`, and positions are uniform with a minimal gap. A stated relation holds within 30 degrees, and
    stated sizes keep 0.75 pixels from the border between right and wrong, which leaves a margin for the judges.
    """
    n = len(captions)
    shape, color = np.full((n, MAX_OBJECTS), -1), np.full((n, MAX_OBJECTS), -1)
    center, radius = np.zeros((n, MAX_OBJECTS, 2)), np.zeros((n, MAX_OBJECTS))
    for i, caption in enumerate(captions):
        k = len(caption.objects)
        shape[i, :k] = [SHAPES.index(o.shape) for o in caption.objects]
        free = rng.integers(len(COLORS), size=k)
        color[i, :k] = [COLORS.index(o.color) if o.color else free[j] for j, o in enumerate(caption.objects)]
        center[i, :k], radius[i, :k] = _place(caption.objects, caption.relation, rng)
    return Scenes(
        torch.from_numpy(shape),
        torch.from_numpy(color),
        torch.from_numpy(center).float(),
        torch.from_numpy(radius).float(),
    )


def random_scenes(count: int, rng: np.random.Generator) -> Scenes:
    """Draws scenes of 0 to 4 arbitrary objects that may touch, in a wider range of sizes than for captions.

    The judges are trained on these, so that they also see the kinds of errors in generated images.
    """
    m = 4
    shape, color = rng.integers(len(SHAPES), size=(count, m)), rng.integers(len(COLORS), size=(count, m))
    center, radius = np.zeros((count, m, 2)), np.ones((count, m))
    objects = np.minimum(rng.integers(0, 6, size=count), m)
    for i, k in enumerate(objects):
        shape[i, k:] = color[i, k:] = -1
        objects_here = [ObjectSpec(SHAPES[s]) for s in shape[i, :k]]
        center[i, :k], radius[i, :k] = _place(objects_here, None, rng, radii=(6.0, 12.5), gap=-1.5)
    return Scenes(
        torch.from_numpy(shape),
        torch.from_numpy(color),
        torch.from_numpy(center).float(),
        torch.from_numpy(radius).float(),
    )


def _place(
    objects: Sequence[ObjectSpec],
    relation: str | None,
    rng: np.random.Generator,
    radii: tuple[float, float] = RADIUS,
    gap: float = GAP,
) -> tuple[np.ndarray, np.ndarray]:
    """Rejection-samples centres ``(k, 2)`` and radii ``(k,)``."""
    k = len(objects)
    extent = np.array([EXTENT[o.shape] for o in objects])
    lowest, highest = np.array([RADIUS_OF_SIZE[o.size] if o.size else radii for o in objects]).reshape(k, 2).T
    while True:
        radius = rng.uniform(lowest, highest)
        reach = radius * extent  # (k,) radius of the circle around each object
        center = rng.uniform(reach[:, None] + 1, IMAGE_SIZE - 1 - reach[:, None], size=(k, 2))
        if k <= 1:
            return center, radius
        if relation:
            # Place the second object relative to the first: a direction and a distance.
            dx, dy = DIRECTIONS[RELATIONS.index(relation)].numpy()
            angle = math.atan2(dy, dx) + rng.uniform(-math.pi / 6, math.pi / 6)
            distance = reach.sum() + gap + rng.uniform(0, 20)
            center[1] = center[0] - distance * np.array([math.cos(angle), math.sin(angle)])
            if (center[1] < reach[1] + 1).any() or (center[1] > IMAGE_SIZE - 1 - reach[1]).any():
                continue
        distances = np.linalg.norm(center[:, None] - center[None], axis=-1)
        apart = distances > reach[:, None] + reach[None] + gap
        if apart[~np.eye(k, dtype=bool)].all():
            return center, radius


def signed_distance(shape: int, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Distance in pixels from an object's outline, negative inside; ``x, y`` are relative to its centre."""
    name = SHAPES[shape]
    if name == "circle":
        return (x * x + y * y).sqrt() - radius
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if name == "triangle":
        slope = torch.maximum(y - 0.62 * radius, 0.866 * x.abs() - 0.5 * y - 0.62 * radius)
        return slope
    arm, width = 1.02 * radius, 0.36 * radius
    across = torch.maximum(x.abs() - arm, y.abs() - width)
    along = torch.maximum(x.abs() - width, y.abs() - arm)
    return torch.minimum(across, along)


def coverage(scenes: Scenes, size: int = IMAGE_SIZE) -> torch.Tensor:
    """The fraction of each pixel that each object covers: ``(B, M, size, size)`` in [0, 1], anti-aliased."""
    axis = torch.arange(size) + 0.5
    x = axis.view(1, 1, 1, -1) - scenes.center[..., 0, None, None]  # (B, M, 1, W)
    y = axis.view(1, 1, -1, 1) - scenes.center[..., 1, None, None]  # (B, M, H, 1)
    x, y = torch.broadcast_tensors(x, y)  # (B, M, H, W)
    radius = scenes.radius[..., None, None]
    cover = torch.zeros(x.shape)
    for index in range(len(SHAPES)):
        here = scenes.shape == index
        if here.any():
            distance = signed_distance(index, x[here], y[here], radius[here])
            cover[here] = (0.5 - distance).clamp(0, 1)
    return cover


def render(scenes: Scenes, rng: np.random.Generator) -> torch.Tensor:
    """Draws images ``(B, 3, 64, 64)`` in [0, 1].

    The background is a grey of 0.85 to 1.0; colours are jittered by up to 0.05 per channel.
    """
    b, m = scenes.shape.shape
    background = torch.from_numpy(rng.uniform(0.85, 1.0, size=(b, 1, 1, 1))).float()
    images = background.expand(b, 3, IMAGE_SIZE, IMAGE_SIZE).clone()
    palette = torch.tensor([RGB[name] for name in COLORS])  # (colours, 3)
    jitter = torch.from_numpy(rng.uniform(-0.05, 0.05, size=(b, m, 3))).float()
    paint = (palette[scenes.color.clamp(min=0)] + jitter).clamp(0, 1)  # (B, M, 3)
    cover = coverage(scenes)
    for k in range(m):
        alpha = cover[:, k, None]
        images = images * (1 - alpha) + paint[:, k, :, None, None] * alpha
    return images


def relation_margin(first: torch.Tensor, second: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """How well each relation holds, by GenEval's rule: ``(..., 4)`` in [-1, 1], true above 0.5.

    GenEval shortens the offset between the centres by a tenth of the summed sizes, normalises it, and calls a
    direction true if its component exceeds 0.5 (within 60 degrees).

    Args:
        first: ``(..., 2)`` centre of the first object.
        second: ``(..., 2)`` centre of the second object.
        sizes: ``(...)`` summed diameters of both, in pixels.
    """
    offset = first - second
    offset = offset.sign() * (offset.abs() - 0.1 * sizes[..., None]).clamp(min=0)
    norm = offset.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 0, offset / norm.clamp(min=1e-9), torch.zeros_like(offset))
    return unit @ DIRECTIONS.T.to(unit)


def matches(scenes: Scenes, captions: CaptionTensors) -> torch.Tensor:
    """Whether image ``i`` shows exactly what caption ``j`` says: ``(B, J)`` bool.

    Exactly means the stated number of objects, every shape, stated colour and stated size right, and the relation
    true. The objects may be in any order.
    """
    wanted = (captions.shape >= 0).sum(-1)  # (J,)
    right_count = scenes.count[:, None] == wanted[None]  # (B, J)
    order = torch.argsort((scenes.shape < 0).int(), dim=1, stable=True)[:, :MAX_OBJECTS]  # objects first
    shape, color = scenes.shape.gather(1, order), scenes.color.gather(1, order)
    center = scenes.center.gather(1, order[..., None].expand(-1, -1, 2))
    radius = scenes.radius.gather(1, order)
    # fits[b, j, m, k]: object m of image b is what slot k of caption j asks for.
    fits = (shape[:, None, :, None] == captions.shape[None, :, None, :]) & (
        (captions.color[None, :, None, :] < 0) | (color[:, None, :, None] == captions.color[None, :, None, :])
    )
    size, measured = captions.size[None, :, None, :], radius[:, None, :, None]
    fits &= (size < 0) | torch.where(size == SIZES.index("small"), measured < SMALL_BELOW, measured > LARGE_ABOVE)
    free = captions.relation < 0
    found = torch.zeros_like(right_count)
    for a, b in ((0, 1), (1, 0)):  # captions of two objects: try both assignments
        margin = relation_margin(center[:, a], center[:, b], 2 * (radius[:, a] + radius[:, b]))  # (B, 4)
        true = free[None] | (margin[:, captions.relation.clamp(min=0)] > 0.5)
        found |= fits[:, :, a, 0] & fits[:, :, b, 1] & true
    alone = fits[:, :, 0, 0]
    alike = fits[:, :, 0, 0] & fits[:, :, 1, 1] & fits[:, :, 2, 2]  # three objects are always alike
    shown = torch.where(wanted == 1, alone, torch.where(wanted == 2, found, alike))
    return right_count & shown
