"""GenEval's rules: whether the objects that a detector found in an image are what its prompt asks for.

Ghosh et al. 2023, "GenEval: An object-focused framework for evaluating text-to-image alignment" (arXiv 2310.11513,
code ``djghosh13/geneval``, MIT licence). A row of ``evaluation_metadata.jsonl`` lists objects that must be in the image
(``include``: at least ``count`` of a ``class``, of a ``color``, at a ``position`` relative to an earlier entry) and
counts that must not be reached (``exclude``). Only the most confident ``count`` objects of a class are looked at.

Boxes are ``(x0, y0, x1, y1)`` in pixels, y downwards; no detector is needed for the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Box = tuple[float, float, float, float]
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidence above which a detection counts; the second one for `counting`
MOST_OBJECTS = 16  # of a class
MARGIN = 0.1  # share of both objects' sizes by which their centres must be further apart
DIRECTION = 0.5  # of the remaining offset, relative to the distance of the centres
OPPOSITES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis and sign


@dataclass(frozen=True)
class Detection:
    """One object.

    Attributes:
        name: Its class, as in the metadata.
        box: Where it is.
        score: Confidence in [0, 1].
        mask: Its pixels ``(H, W)``, boolean; ``None`` for all of the box. The rules do not use it.
    """

    name: str
    box: Box
    score: float
    mask: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Verdict:
    """Whether an image is correct, and why not."""

    correct: bool
    reasons: tuple[str, ...]


Colors = Callable[[Sequence[Detection]], Sequence[str]]
"""The color of each object of one class; see :data:`COLORS`."""


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, counted in whole pixels: a box from 2 to 2 is one pixel wide."""
    area = lambda box: max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - shared
    return shared / union if union else 0.0


def kept_objects(detections: Sequence[Detection], tag: str, *, max_overlap: float = 1.0) -> dict[str, list[Detection]]:
    """The detections that count, by class, the most confident first.

    Args:
        detections: What a detector found.
        tag: Category of the prompt; ``counting`` has a threshold of its own.
        max_overlap: Overlap with a more confident object of the class from which a detection is dropped; 1 for never.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda one: -one.score):
        if detection.score > threshold:
            found.setdefault(detection.name, []).append(detection)
    kept: dict[str, list[Detection]] = {}
    for name, objects in found.items():
        own = kept.setdefault(name, [])
        for one in objects[:MOST_OBJECTS]:
            if max_overlap == 1 or all(overlap(other.box, one.box) < max_overlap for other in own):
                own.append(one)
    return kept


def relations(a: Box, b: Box) -> set[str]:
    """Where ``a`` is relative to ``b``: none, one or two of "left of", "right of", "above", "below".

    The offset of the centres is shortened by :data:`MARGIN` of both sizes, axis by axis; what remains along an axis
    must exceed :data:`DIRECTION` of the distance of the centres.
    """
    offsets = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in range(2)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in range(2)]
    left = [max(abs(offset) - MARGIN * size, 0.0) for offset, size in zip(offsets, sizes, strict=True)]
    if max(left) < 1e-3:
        return set()
    distance = (offsets[0] ** 2 + offsets[1] ** 2) ** 0.5
    return {
        name
        for name, (axis, sign) in OPPOSITES.items()
        if offsets[axis] * sign > 0 and left[axis] / distance > DIRECTION
    }


def judge(metadata: Mapping[str, Any], objects: Mapping[str, Sequence[Detection]], colors: Colors) -> Verdict:
    """Whether an image is correct.

    Args:
        metadata: A row of ``evaluation_metadata.jsonl``.
        objects: Detections by class, from :func:`kept_objects`.
        colors: Tells the colors of objects of one class; asked only where the prompt names one.

    Raises:
        ValueError: If a position refers to the entry itself or a later one.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # the objects of every entry, or None where it is not fulfilled
    for entry in metadata.get("include", ()):
        name, count = entry["class"], entry["count"]
        found = list(objects.get(name, ()))[:count]
        problem = ""
        if len(found) < count:
            problem = f"expected {count} {name}, found {len(found)}"
        elif "color" in entry and (seen := list(colors(found))).count(entry["color"]) < count:
            problem = f"expected {count} {entry['color']} {name}, found {', '.join(seen)}"
        elif "position" in entry:
            problem = _misplaced(entry, found, groups)
        groups.append(None if problem else found)
        reasons += [problem] * bool(problem)
    for entry in metadata.get("exclude", ()):
        number = len(objects.get(entry["class"], ()))
        if number >= entry["count"]:
            reasons.append(f"expected fewer than {entry['count']} {entry['class']}, found {number}")
    return Verdict(not reasons, tuple(reasons))


def _misplaced(
    entry: Mapping[str, Any], found: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]
) -> str:
    """Why objects are not where an entry wants them; every one is compared with every one of the other entry."""
    wanted, target = entry["position"]
    if not 0 <= target < len(groups):
        raise ValueError(f"the position of {entry['class']!r} refers to entry {target}, which is not an earlier one")
    others = groups[target]
    if others is None:
        return f"no target for {entry['class']} to be {wanted}"
    for one in found:
        for other in others:
            if wanted not in (seen := relations(one.box, other.box)):
                return (
                    f"expected {entry['class']} {wanted} {other.name}, found {' and '.join(sorted(seen)) or 'neither'}"
                )
    return ""


def accuracy(verdicts: Sequence[bool], tags: Sequence[str]) -> dict[str, float]:
    """Share of correct images by category, and their mean over categories as ``overall``, as GenEval's summary.

    Raises:
        ValueError: If there is no image, or not one category per image.
    """
    if not tags or len(verdicts) != len(tags):
        raise ValueError(
            f"expected one category per image and at least one, got {len(tags)} for {len(verdicts)} images"
        )
    shares = {}
    for tag in dict.fromkeys(tags):
        own = [bool(correct) for correct, other in zip(verdicts, tags, strict=True) if other == tag]
        shares[tag] = sum(own) / len(own)
    return shares | {"overall": sum(shares.values()) / len(shares)}
