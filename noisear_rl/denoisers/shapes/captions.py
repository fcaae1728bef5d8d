"""Captions of the shapes world: six categories with GenEval's names, a fixed split, and a parser.

A caption says exactly what an image must show; nothing else may appear in it:

==============  =====================================================  ==================
category        example                                                objects
==============  =====================================================  ==================
single_object   a photo of a circle                                    1
two_object      a photo of a circle and a square                       2
counting        a photo of three red squares                           2 or 3, all alike
colors          a photo of a red circle                                1
position        a photo of a red circle left of a blue square          2 and a relation
color_attr      a photo of a red circle and a blue square              2
==============  =====================================================  ==================

The categories are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513).

Shapes of tensors: ``B`` captions, ``K = 3`` object slots.
"""

from __future__ import annotations

import difflib
import itertools
import random
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
COLORS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "black")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
CATEGORIES: tuple[str, ...] = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
)
COUNTS: dict[str, int] = {"two": 2, "three": 3}
MAX_OBJECTS = 3
PREFIX = "a photo of "
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
HELD_OUT_SHARE = 0.2
SPLIT_SEED = 20250601


@dataclass(frozen=True)
class ObjectSpec:
    """One object that a caption asks for; ``color`` is ``None`` if any colour will do."""

    shape: str
    color: str | None = None

    def __str__(self) -> str:
        return f"{self.color} {self.shape}" if self.color else self.shape


@dataclass(frozen=True)
class Caption:
    """A caption and its meaning.

    Attributes:
        text: The prompt.
        category: One of :data:`CATEGORIES`.
        objects: What the image must show, in the order of the text.
        relation: Position of the first object relative to the second, one of :data:`RELATIONS`.
    """

    text: str
    category: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _caption(category: str, body: str, *objects: ObjectSpec, relation: str | None = None) -> Caption:
    return Caption(PREFIX + body, category, objects, relation)


@cache
def all_captions() -> tuple[Caption, ...]:
    """Every caption of the world, 2,904 in all, in a fixed order."""
    plain = [ObjectSpec(shape) for shape in SHAPES]
    colored = [ObjectSpec(shape, color) for color in COLORS for shape in SHAPES]
    captions = [_caption("single_object", f"a {o}", o) for o in plain]
    captions += [_caption("colors", f"a {o}", o) for o in colored]
    for word, n in COUNTS.items():
        for o in plain + colored:
            phrase = f"{o.color} {_plural(o.shape)}" if o.color else _plural(o.shape)
            captions.append(_caption("counting", f"{word} {phrase}", *[o] * n))
    for objects, both in ((plain, "two_object"), (colored, "color_attr")):
        for a, b in itertools.permutations(objects, 2):
            captions.append(_caption(both, f"a {a} and a {b}", a, b))
            captions += [_caption("position", f"a {a} {r} a {b}", a, b, relation=r) for r in RELATIONS]
    return tuple(captions)


@cache
def _by_text() -> dict[str, Caption]:
    return {caption.text: caption for caption in all_captions()}


@cache
def _by_meaning() -> dict[tuple[tuple[ObjectSpec, ...], str | None], Caption]:
    return {(caption.objects, caption.relation): caption for caption in all_captions()}


@cache
def captions_of(split: Split, category: str | None = None) -> tuple[Caption, ...]:
    """The captions of one side of the fixed split.

    A fifth of every category (at least one caption), drawn with a fixed seed, is held out. Every word
    of the vocabulary occurs on both sides.

    Args:
        split: ``"train"`` or ``"held_out"``.
        category: One of :data:`CATEGORIES`, or ``None`` for all of them.

    Raises:
        ValueError: If the split or the category is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {SPLITS}")
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; expected one of {CATEGORIES}")
    if category is None:
        return tuple(c for name in CATEGORIES for c in captions_of(split, name))
    # Coloured and plain captions of a category are split separately, so that both kinds occur on both sides.
    chosen: list[Caption] = []
    for colored in (False, True):
        pool = [c for c in all_captions() if c.category == category and bool(c.objects[0].color) == colored]
        random.Random(f"{SPLIT_SEED}/{category}/{colored}").shuffle(pool)
        held_out = max(1, round(HELD_OUT_SHARE * len(pool))) if pool else 0
        chosen += pool[:held_out] if split == "held_out" else pool[held_out:]
    return tuple(chosen)


def balanced_captions(split: Split, count: int, seed: int = 0) -> list[Caption]:
    """Draws captions in equal shares from the six categories, and from plain and coloured ones.

    Args:
        split: ``"train"`` or ``"held_out"``.
        count: How many to draw. No caption is repeated before all captions of its kind have been drawn.
        seed: Seed of the draw.

    Returns:
        ``count`` captions that cycle through the categories.
    """
    rng = random.Random(f"{seed}/{split}")
    kinds: dict[str, list[list[Caption]]] = {}
    for category in CATEGORIES:
        pool = captions_of(split, category)
        groups = [[c for c in pool if bool(c.objects[0].color) == colored] for colored in (False, True)]
        kinds[category] = [group for group in groups if group]
    drawn: list[Caption] = []
    stacks: dict[tuple[str, int], list[Caption]] = {}
    for i in range(count):
        category = CATEGORIES[i % len(CATEGORIES)]
        kind = (i // len(CATEGORIES)) % len(kinds[category])
        stack = stacks.setdefault((category, kind), [])
        if not stack:
            stack += rng.sample(kinds[category][kind], len(kinds[category][kind]))
        drawn.append(stack.pop())
    return drawn


def parse_caption(text: str) -> Caption:
    """Parses a prompt.

    Raises:
        ValueError: If the prompt is not a caption of this world; the message names the nearest one.
    """
    known = _by_text()
    normal = " ".join(text.lower().split()).rstrip(".")
    for candidate in (normal, PREFIX + normal):
        if candidate in known:
            return known[candidate]
    near = difflib.get_close_matches(normal, known, n=1, cutoff=0.0)
    raise ValueError(f"{text!r} is not a caption of the shapes world; the nearest one is {near[0]!r}")


@cache
def vocabulary() -> tuple[str, ...]:
    """All words that occur in captions, sorted."""
    return tuple(sorted({word for caption in all_captions() for word in caption.text.split()}))


def hard_negative(caption: Caption, rng: random.Random) -> Caption:
    """A caption that differs in one thing: a colour, a shape, the count, the relation or who has what."""
    first, *rest = caption.objects
    options: list[tuple[tuple[ObjectSpec, ...], str | None]] = []
    for i, spec in enumerate(caption.objects):
        if caption.category == "counting" and i:
            break
        changed = [ObjectSpec(s, spec.color) for s in SHAPES if s != spec.shape]
        if spec.color:
            changed += [ObjectSpec(spec.shape, c) for c in COLORS if c != spec.color]
        new = rng.choice(changed)
        objects = (new,) * len(caption.objects) if caption.category == "counting" else None
        options.append((objects or (*caption.objects[:i], new, *caption.objects[i + 1 :]), caption.relation))
    if caption.category == "counting":
        options += [((first,) * (5 - len(caption.objects)), None), ((first,), None)] * 2
    if rest and caption.category != "counting":
        second = rest[0]
        if first.color and first.color != second.color and first.shape != second.shape:
            swapped = (ObjectSpec(first.shape, second.color), ObjectSpec(second.shape, first.color))
            options += [(swapped, caption.relation)] * 2
        if caption.relation:
            options += [((second, first), caption.relation)] * 2
            options += [(caption.objects, r) for r in RELATIONS if r != caption.relation]
    return _by_meaning().get(rng.choice(options)) or rng.choice(all_captions())


@dataclass
class CaptionTensors:
    """Meanings of ``B`` captions as integers; ``-1`` stands for *no object* or *any*.

    Attributes:
        shape: ``(B, K)`` indices into :data:`SHAPES`.
        color: ``(B, K)`` indices into :data:`COLORS`.
        relation: ``(B,)`` indices into :data:`RELATIONS`.
    """

    shape: torch.Tensor
    color: torch.Tensor
    relation: torch.Tensor

    @classmethod
    def from_captions(cls, captions: list[Caption]) -> CaptionTensors:
        """Encodes captions."""
        shape = torch.full((len(captions), MAX_OBJECTS), -1)
        color, relation = shape.clone(), torch.full((len(captions),), -1)
        for i, caption in enumerate(captions):
            for k, spec in enumerate(caption.objects):
                shape[i, k] = SHAPES.index(spec.shape)
                color[i, k] = COLORS.index(spec.color) if spec.color else -1
            relation[i] = RELATIONS.index(caption.relation) if caption.relation else -1
        return cls(shape, color, relation)
