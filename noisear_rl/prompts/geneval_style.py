"""Generates prompts in GenEval's six categories about a separate list of everyday objects.

=============  =================================================
category       example
=============  =================================================
single_object  a photo of an umbrella
two_object     a photo of a teapot and a giraffe
counting       a photo of three knives
colors         a photo of an orange suitcase
position       a photo of a lamp left of a zebra
color_attr     a photo of a purple apple and a white bus
=============  =================================================

The categories and the wording are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513), the prompts are not: they are
meant for training and for choosing settings, so that GenEval's own prompts stay reserved for evaluation. Short prompts
can occur in both: most of single_object, a fifth of counting, a tenth of colors.
"""

from __future__ import annotations

import itertools
import random

from noisear_rl.denoisers.shapes.captions import CATEGORIES, PREFIX, RELATIONS
from noisear_rl.prompts.sets import PromptSet

# Each noun takes "an" exactly if its first letter is a vowel.
OBJECTS: tuple[str, ...] = (
    *(
        "airplane",
        "apple",
        "backpack",
        "banana",
        "basket",
        "bench",
        "bicycle",
        "bird",
        "boat",
        "book",
        "bottle",
        "bowl",
    ),
    *("bus", "butterfly", "cake", "candle", "car", "cat", "chair", "clock", "cow", "dog", "donut", "elephant"),
    *("envelope", "fork", "giraffe", "guitar", "hat", "horse", "kite", "knife", "ladder", "lamp", "laptop", "owl"),
    *("pillow", "sheep", "shoe", "spoon", "suitcase", "teapot", "toothbrush", "train", "truck", "umbrella", "vase"),
    "zebra",
)
IRREGULAR_PLURALS: dict[str, str] = {"knife": "knives", "sheep": "sheep"}
COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS: tuple[str, ...] = ("two", "three", "four")


def geneval_style_prompts(count_per_category: int, seed: int = 0) -> PromptSet:
    """Generates prompts with equal shares of GenEval's six categories, in alternation.

    No two prompts are equal, and no two prompts of a category name the same two objects. A larger count with the same
    seed appends to the same prompts.

    Args:
        count_per_category: Prompts per category, from 1 to the number of :data:`OBJECTS`, 48.
        seed: Seed of the draw.

    Raises:
        ValueError: If ``count_per_category`` is out of range.
    """
    if not 1 <= count_per_category <= len(OBJECTS):
        raise ValueError(f"count_per_category must be 1 to {len(OBJECTS)}, got {count_per_category}")
    written = [_written(category, random.Random(f"{seed}/{category}")) for category in CATEGORIES]
    prompts = [texts[i] for i in range(count_per_category) for texts in written]
    return PromptSet("geneval-style", prompts, list(CATEGORIES) * count_per_category)


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun phrase made of this module's words."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Plural of one of :data:`OBJECTS`."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def _written(category: str, rng: random.Random) -> list[str]:
    """All prompts of a category, in random order."""
    match category:
        case "single_object":
            bodies = [with_article(noun) for noun in OBJECTS]
        case "counting":
            bodies = [f"{number} {plural(noun)}" for number in NUMBERS for noun in OBJECTS]
        case "colors":
            bodies = [with_article(f"{color} {noun}") for color in COLORS for noun in OBJECTS]
        case _:
            pairs = [rng.sample(pair, 2) for pair in itertools.combinations(OBJECTS, 2)]
            bodies = [_pair(category, first, second, rng) for first, second in pairs]
    return [PREFIX + body for body in rng.sample(bodies, len(bodies))]


def _pair(category: str, first: str, second: str, rng: random.Random) -> str:
    if category == "position":
        return f"{with_article(first)} {rng.choice(RELATIONS)} {with_article(second)}"
    if category == "color_attr":
        first, second = (f"{color} {noun}" for color, noun in zip(rng.sample(COLORS, 2), (first, second), strict=True))
    return f"{with_article(first)} and {with_article(second)}"
