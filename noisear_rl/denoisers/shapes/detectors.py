"""Two independent judges of shapes images: which objects does an image contain, and where?

:class:`CenterDetector` finds peaks of a centre heat map (Zhou et al. 2019, *Objects as Points*) with a
strided residual network; rewards use it. :class:`CoreDetector` segments the cores of objects with a
U-shaped network and counts connected components; only evaluation uses it. They share neither layers nor
decoding nor training seed, so that the second exposes an algorithm that exploits the first.

Shapes: ``B`` images ``(B, 3, 64, 64)`` in [0, 1], ``G`` cells per side of the output grid.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from noisear_rl.denoisers.shapes.captions import COLORS, SHAPES
from noisear_rl.denoisers.shapes.world import IMAGE_SIZE, Scenes

MAX_DETECTIONS = 6


@dataclass
class Candidates:
    """Possible objects in ``B`` images, by decreasing confidence.

    Attributes:
        confidence: ``(B, M)`` in [0, 1].
        shape: ``(B, M, shapes)`` probabilities.
        color: ``(B, M, colours)`` probabilities.
        center: ``(B, M, 2)`` pixels.
        radius: ``(B, M)`` pixels.
    """

    confidence: torch.Tensor
    shape: torch.Tensor
    color: torch.Tensor
    center: torch.Tensor
    radius: torch.Tensor


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


class Detector(nn.Module):
    """Code shared by both judges: the channels of the output grid, the loss and the file format.

    ``forward`` returns logits ``(B, 1 + colours + shapes + 3, G, G)``: objectness, colour, shape, offset of
    the object's centre from the cell's ``(x, y)`` in cells, radius in units of 10 pixels.
    """

    grid: int
    threshold = 0.5

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images to the output grid."""
        raise NotImplementedError

    def detect(self, images: torch.Tensor) -> Scenes:
        """Finds at most ``MAX_DETECTIONS`` objects in each image."""
        raise NotImplementedError

    def split(self, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output grid → objectness ``(B,G,G)``, colour, shape and geometry logits ``(B,·,G,G)``."""
        object_logit, color, shape, geometry = grid.split([1, len(COLORS), len(SHAPES), 3], dim=1)
        return object_logit[:, 0], color, shape, geometry

    def centers(self, geometry: torch.Tensor) -> torch.Tensor:
        """Centres predicted by every cell, in pixels: ``(B, 2, G, G)``."""
        axis = torch.arange(self.grid, device=geometry.device) + 0.5
        x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)
        return torch.stack([geometry[:, 0] + x, geometry[:, 1] + y], 1) * (IMAGE_SIZE / self.grid)

    def loss(self, grid: torch.Tensor, scenes: Scenes) -> torch.Tensor:
        """Training loss of an output grid: objectness everywhere, the rest on the cells of objects."""
        objectness, color, shape, geometry = self.split(grid)
        cell = IMAGE_SIZE / self.grid
        axis = (torch.arange(self.grid, device=grid.device) + 0.5) * cell
        dx = axis.view(1, 1, 1, -1) - scenes.center[..., 0, None, None]
        dy = axis.view(1, 1, -1, 1) - scenes.center[..., 1, None, None]
        present = (scenes.shape >= 0)[..., None, None]
        distance = torch.where(present, (dx * dx + dy * dy).sqrt(), torch.inf)  # (B, M, G, G)
        target = self.objectness_target(distance, scenes.radius[..., None, None])  # (B, G, G)
        nearest, owner = distance.min(1)  # (B, G, G)
        inside = nearest < 6.0
        take = lambda values: values.gather(1, owner.flatten(1)).view_as(owner)
        loss = 20 * F.binary_cross_entropy_with_logits(objectness, target)
        loss = loss + F.cross_entropy(color, take(scenes.color).masked_fill(~inside, -100))
        loss = loss + F.cross_entropy(shape, take(scenes.shape).masked_fill(~inside, -100))
        want = torch.stack([take(scenes.center[..., 0]), take(scenes.center[..., 1])], 1)
        error = (self.centers(geometry) - want).abs().mean(1) / cell
        error = error + (geometry[:, 2] - take(scenes.radius) / 10).abs()
        return loss + (error * inside).sum() / inside.sum().clamp(min=1)

    def objectness_target(self, distance: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        """Target of the objectness channel ``(B, G, G)`` from distances ``(B, M, G, G)`` in pixels."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Writes ``model.safetensors`` (float16) and ``config.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"architecture": type(self).__name__}) + "\n")


class CenterDetector(Detector):
    """The training judge: peaks of a centre heat map on a 16×16 grid."""

    grid = 16

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            *[_Residual(width, dilation) for dilation in (1, 2, 1, 2)],
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 1 + len(COLORS) + len(SHAPES) + 3, 1),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images * 2 - 1)

    def objectness_target(self, distance: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        return torch.exp(-((distance / 5.0) ** 2)).amax(1)

    def candidates(self, images: torch.Tensor) -> Candidates:
        """The strongest local peaks, regardless of the threshold. Differentiable with respect to the images."""
        objectness, color, shape, geometry = self.split(self(images.float()))
        heat = objectness.sigmoid()
        peak = heat == F.max_pool2d(heat[:, None], 5, 1, 2)[:, 0]
        confidence, index = (heat * peak).flatten(1).topk(MAX_DETECTIONS, dim=1)  # (B, M)
        pick = lambda grid: grid.flatten(2).gather(2, index[:, None].expand(-1, grid.shape[1], -1)).mT
        return Candidates(
            confidence,
            pick(shape.softmax(1)),
            pick(color.softmax(1)),
            pick(self.centers(geometry)),
            pick(geometry[:, 2:])[..., 0] * 10,
        )

    @torch.no_grad()
    def detect(self, images: torch.Tensor) -> Scenes:
        return self.decide(self.candidates(images))

    def decide(self, found: Candidates) -> Scenes:
        """The candidates above the threshold, each with its most likely shape and colour."""
        absent = found.confidence <= self.threshold
        return Scenes(
            found.shape.argmax(-1).masked_fill(absent, -1),
            found.color.argmax(-1).masked_fill(absent, -1),
            found.center,
            found.radius,
        )


class CoreDetector(Detector):
    """The held-out judge: connected components of object cores on a 32×32 grid."""

    grid = 32
    min_cells = 4

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 5, stride=2, padding=2), _Residual(width))
        self.down1 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), _Residual(2 * width))
        self.down2 = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1), _Residual(2 * width))
        self.up1 = nn.Sequential(nn.Conv2d(4 * width, 2 * width, 3, padding=1), _Residual(2 * width))
        self.up2 = nn.Sequential(nn.Conv2d(3 * width, width, 3, padding=1), _Residual(width))
        self.head = nn.Sequential(nn.SiLU(), nn.Conv2d(width, 1 + len(COLORS) + len(SHAPES) + 3, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        fine = self.stem(images * 2 - 1)  # (B, w, 32, 32)
        middle = self.down1(fine)  # (B, 2w, 16, 16)
        coarse = self.down2(middle)  # (B, 2w, 8, 8)
        middle = self.up1(torch.cat([middle, F.interpolate(coarse, scale_factor=2.0)], 1))
        return self.head(self.up2(torch.cat([fine, F.interpolate(middle, scale_factor=2.0)], 1)))

    def objectness_target(self, distance: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        return (distance < 0.55 * radius).float().amax(1)

    @torch.no_grad()
    def detect(self, images: torch.Tensor) -> Scenes:
        objectness, color, shape, geometry = self.split(self(images.float()))
        core = objectness.sigmoid() > self.threshold  # (B, G, G)
        label = connected_components(core)  # (B, G, G)
        number = torch.arange(1, MAX_DETECTIONS + 1, device=label.device)
        member = label.flatten(1)[:, None] == number.view(1, -1, 1)  # (B, M, G·G)
        cells = member.sum(-1)
        found = cells >= self.min_cells
        weight = member.float() / cells.clamp(min=1)[..., None]
        average = lambda values: torch.einsum("bmg,bcg->bmc", weight, values.flatten(2))
        return Scenes(
            average(shape.softmax(1)).argmax(-1).masked_fill(~found, -1),
            average(color.softmax(1)).argmax(-1).masked_fill(~found, -1),
            average(self.centers(geometry)),
            average(geometry[:, 2:])[..., 0] * 10,
        )


def connected_components(mask: torch.Tensor) -> torch.Tensor:
    """Labels the 4-connected components of ``(B, G, G)`` masks 1, 2, … by decreasing size; 0 is background."""
    b, g, _ = mask.shape
    numbers = torch.arange(1, g * g + 2, device=mask.device)
    label = numbers[:-1].view(1, g, g).expand(b, g, g) * mask
    while True:
        padded = F.pad(label, (1, 1, 1, 1))
        around = [padded[:, 1:-1, :-2], padded[:, 1:-1, 2:], padded[:, :-2, 1:-1], padded[:, 2:, 1:-1]]
        spread = torch.stack([label, *around]).amax(0) * mask
        if torch.equal(spread, label):
            break
        label = spread
    size = torch.zeros(b, g * g + 1, dtype=torch.long, device=mask.device)
    size.scatter_add_(1, label.flatten(1), mask.flatten(1).long())
    size[:, 0] = -1  # the background stays last, whatever its size
    order = size.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, numbers.expand(b, -1).contiguous())
    return rank.gather(1, label.flatten(1)).view(b, g, g) * mask


def load_detector(folder: str | Path) -> Detector:
    """Loads a judge written by :meth:`Detector.save`, frozen and in eval mode.

    Raises:
        FileNotFoundError: If the folder contains no judge.
        ValueError: If the weights do not match the architecture.
    """
    folder = Path(folder)
    classes = {cls.__name__: cls for cls in (CenterDetector, CoreDetector)}
    name = json.loads((folder / "config.json").read_text())["architecture"]
    if name not in classes:
        raise ValueError(f"{folder}: unknown detector {name!r}; expected one of {sorted(classes)}")
    detector = classes[name]()
    state = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not match {name}: {error}") from error
    return detector.eval().requires_grad_(False)
