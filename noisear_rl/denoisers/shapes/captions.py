"""Captions of the shapes world: six categories with GenEval's names, a fixed split by meaning, and a parser.

A caption says exactly what an image must show; nothing else may appear in it:

==============  =====================================================  ==================
category        example                                                objects
==============  =====================================================  ==================
single_object   a photo of a small circle                              1
two_object      a photo of a circle and a large square                 2
counting        a photo of three red squares                           2 or 3, all alike
colors          a photo of a large red circle                          1
position        a photo of a red circle left of a blue square          2 and a relation
color_attr      a photo of a red circle and a blue square              2
==============  =====================================================  ==================

The categories are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513). Sizes are stated for one or two objects, and
not together with two colours, so that the world stays small.

Shapes of tensors: ``B`` captions, ``K = 3`` object slots.
"""

from __future__ import annotations

import difflib
import itertools
import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import torch

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
COLORS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "black")
SIZES: tuple[str, ...] = ("small", "large")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
MIRRORED: dict[str, str] = {"right of": "left of", "below": "above"}  # the same relation with the objects exchanged
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
LONGEST = 200  # characters of a prompt that is no caption, in messages
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
# Share of the meanings of a kind of captions, and how many at least.
RESERVED: dict[Split, tuple[float, int]] = {"test": (0.2, 4), "validation": (0.15, 2)}
SPLIT_SEED = 20261126


@dataclass(frozen=True)
class ObjectSpec:
    """One object that a caption asks for; ``color`` and ``size`` are ``None`` if any will do."""

    shape: str
    color: str | None = None
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape) if word)


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


def _plural(phrase: str) -> str:
    return phrase + ("es" if phrase.endswith("s") else "s")


def _caption(category: str, body: str, *objects: ObjectSpec, relation: str | None = None) -> Caption:
    return Caption(PREFIX + body, category, objects, relation)


def _could_be_alike(a: ObjectSpec, b: ObjectSpec) -> bool:
    """Whether one object may fit both descriptions, so that "a circle and a small circle" would not say much."""
    return a.shape == b.shape and all(
        x is None or y is None or x == y for x, y in ((a.color, b.color), (a.size, b.size))
    )


@cache
def all_captions() -> tuple[Caption, ...]:
    """Every caption of the world, 3,536 in all, in a fixed order."""
    plain = [ObjectSpec(shape) for shape in SHAPES]
    colored = [ObjectSpec(shape, color) for color in COLORS for shape in SHAPES]
    sized = lambda objects: [*objects, *(replace(o, size=size) for size in SIZES for o in objects)]
    captions = [_caption("single_object", f"a {o}", o) for o in sized(plain)]
    captions += [_caption("colors", f"a {o}", o) for o in sized(colored)]
    for word, n in COUNTS.items():
        objects = sized(plain + colored) if n == 2 else plain + colored  # three large ones hardly fit
        captions += [_caption("counting", f"{word} {_plural(str(o))}", *[o] * n) for o in objects]
    for objects, both in ((sized(plain), "two_object"), (colored, "color_attr")):
        for a, b in itertools.permutations(objects, 2):
            if _could_be_alike(a, b):
                continue
            captions.append(_caption(both, f"a {a} and a {b}", a, b))
            captions += [_caption("position", f"a {a} {r} a {b}", a, b, relation=r) for r in RELATIONS]
    return tuple(captions)


def meaning(caption: Caption) -> tuple[tuple[str, ...], str | None]:
    """What a caption says in any order: equal for "a left of b" and "b right of a", and for "a and b" and "b and a"."""
    objects = tuple(str(o) for o in caption.objects)
    if caption.relation is None:
        return tuple(sorted(objects)), None
    if caption.relation in MIRRORED:
        return objects[::-1], MIRRORED[caption.relation]
    return objects, caption.relation


@cache
def _by_text() -> dict[str, Caption]:
    return {caption.text: caption for caption in all_captions()}


@cache
def _by_meaning() -> dict[tuple[tuple[ObjectSpec, ...], str | None], Caption]:
    return {(caption.objects, caption.relation): caption for caption in all_captions()}


@cache
def captions_of(split: Split, category: str | None = None) -> tuple[Caption, ...]:
    """The captions of one part of the fixed split.

    The split is one of *meanings*: captions that say the same in another order are always in the same part. Of every
    category, and of its plain and its coloured captions separately, a share of :data:`RESERVED` is drawn with a fixed
    seed for ``test`` and ``validation``; every word of the vocabulary occurs in every part.

    Args:
        split: ``"train"``; ``"validation"``, where settings are chosen; or ``"test"``, for published claims alone.
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
    chosen: list[Caption] = []
    for colored in (False, True):
        pool = [c for c in all_captions() if c.category == category and bool(c.objects[0].color) == colored]
        meanings = list(dict.fromkeys(meaning(c) for c in pool))
        random.Random(f"{SPLIT_SEED}/{category}/{colored}").shuffle(meanings)
        parts: dict[Split, set[tuple[tuple[str, ...], str | None]]] = {}
        start = 0
        for part, (share, least) in RESERVED.items():
            end = start + max(least, round(share * len(meanings)))
            parts[part], start = set(meanings[start:end]), end
        parts["train"] = set(meanings[start:])
        chosen += [c for c in pool if meaning(c) in parts[split]]
    return tuple(chosen)


def balanced_captions(split: Split, count: int, seed: int = 0) -> list[Caption]:
    """Draws captions in equal shares from the six categories, and from plain and coloured ones.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
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


def evaluation_captions(split: Split, per_category: int = 40) -> list[Caption]:
    """Chooses captions for an evaluation: distinct ones, one per meaning, whatever their number.

    The choice is fixed. A smaller ``per_category`` gives the first captions of every category.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        per_category: How many captions per category at most, equally many plain and coloured ones while there are some.

    Returns:
        Captions in the order of the categories; small categories have fewer.
    """
    chosen: list[Caption] = []
    for category in CATEGORIES:
        rng = random.Random(f"{SPLIT_SEED}/{split}/{category}")
        kinds: list[list[Caption]] = []
        for colored in (False, True):
            said: dict[tuple[tuple[str, ...], str | None], list[Caption]] = {}
            for caption in captions_of(split, category):
                if bool(caption.objects[0].color) == colored:
                    said.setdefault(meaning(caption), []).append(caption)
            kinds.append([rng.choice(alike) for alike in rng.sample(list(said.values()), len(said))])
        in_turn = (caption for pair in itertools.zip_longest(*kinds) for caption in pair if caption is not None)
        chosen += itertools.islice(in_turn, per_category)
    return chosen


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
    near = difflib.get_close_matches(normal[:LONGEST], known, n=1, cutoff=0.0)
    raise ValueError(f"{text[:LONGEST]!r} is not a caption of the shapes world; the nearest one is {near[0]!r}")


@cache
def vocabulary() -> tuple[str, ...]:
    """All words that occur in captions, sorted."""
    return tuple(sorted({word for caption in all_captions() for word in caption.text.split()}))


def hard_negative(caption: Caption, rng: random.Random) -> Caption:
    """A caption that differs in one thing: a colour, a size, a shape, the count, the relation or who has what."""
    first, *rest = caption.objects
    alike = caption.category == "counting"
    options: list[tuple[tuple[ObjectSpec, ...], str | None]] = []
    for i, spec in enumerate(caption.objects[:1] if alike else caption.objects):
        changed = [replace(spec, shape=s) for s in SHAPES if s != spec.shape]
        if spec.color:
            changed += [replace(spec, color=c) for c in COLORS if c != spec.color]
        if spec.size:
            changed += [replace(spec, size=s) for s in SIZES if s != spec.size] * 2
        for new in changed:
            objects = (new,) * len(caption.objects) if alike else _exchanged(caption.objects, i, new)
            options.append((objects, caption.relation))
    options *= 2
    if alike:
        options += [((first,) * (5 - len(caption.objects)), None), ((first,), None)] * len(options)
    elif rest:
        second = rest[0]
        binding: list[tuple[tuple[ObjectSpec, ...], str | None]] = []
        if first.shape != second.shape:
            colors = (replace(first, color=second.color), replace(second, color=first.color))
            sizes = (replace(first, size=second.size), replace(second, size=first.size))
            binding += [(colors, caption.relation)] * 4
            if first.size and second.size:
                binding += [(sizes, caption.relation)] * 4
        if caption.relation:
            binding += [((second, first), caption.relation)] * 4
            binding += [(caption.objects, r) for r in RELATIONS if r != caption.relation] * 2
        options += binding * 2
    known = _by_meaning()
    possible = [known[key] for key in options if key in known and key != (caption.objects, caption.relation)]
    return rng.choice(possible)


def _exchanged(objects: tuple[ObjectSpec, ...], i: int, new: ObjectSpec) -> tuple[ObjectSpec, ...]:
    return (*objects[:i], new, *objects[i + 1 :])


@dataclass
class CaptionTensors:
    """Meanings of ``B`` captions as integers; ``-1`` stands for *no object* or *any*.

    Attributes:
        shape: ``(B, K)`` indices into :data:`SHAPES`.
        color: ``(B, K)`` indices into :data:`COLORS`.
        size: ``(B, K)`` indices into :data:`SIZES`.
        relation: ``(B,)`` indices into :data:`RELATIONS`.
    """

    shape: torch.Tensor
    color: torch.Tensor
    size: torch.Tensor
    relation: torch.Tensor

    @classmethod
    def from_captions(cls, captions: list[Caption], device: torch.device | str = "cpu") -> CaptionTensors:
        """Encodes captions."""
        shape = torch.full((len(captions), MAX_OBJECTS), -1)
        color, size, relation = shape.clone(), shape.clone(), torch.full((len(captions),), -1)
        for i, caption in enumerate(captions):
            for k, spec in enumerate(caption.objects):
                shape[i, k] = SHAPES.index(spec.shape)
                color[i, k] = COLORS.index(spec.color) if spec.color else -1
                size[i, k] = SIZES.index(spec.size) if spec.size else -1
            relation[i] = RELATIONS.index(caption.relation) if caption.relation else -1
        return cls(*(values.to(device) for values in (shape, color, size, relation)))
