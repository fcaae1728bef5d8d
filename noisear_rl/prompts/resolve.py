"""Resolves the ``prompts`` option: splits of the shapes world, files, published sets, or prompts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from noisear_rl.denoisers import EMBEDDED
from noisear_rl.denoisers.shapes.captions import CATEGORIES, SPLITS, balanced_captions, captions_of, parse_caption
from noisear_rl.prompts.geneval_style import geneval_style_prompts
from noisear_rl.prompts.sets import PUBLISHED, PromptSet, load_prompt_set

BALANCED = tuple(f"{split}-balanced" for split in SPLITS)
BALANCED_COUNT = 3000
EXAMPLE_PROMPTS = (
    "a red cube on top of a blue sphere",
    "three apples on a wooden table",
    "a photo of a dog left of a bench",
    "a watercolor painting of a lighthouse at dawn",
)


def resolve_prompts(
    prompts: str | Sequence[str] | None,
    denoiser: str,
    *,
    count: int | None = None,
    skip_bad_rows: bool = False,
    allow_test: bool = False,
) -> PromptSet:
    """Resolves the ``prompts`` option of every command.

    Args:
        prompts: A list of prompts; or one string:

            * for the embedded denoisers a split of the shapes world (``train``, ``validation``, ``test``), or a split
              with equal shares of the categories, with captions of small categories repeated (``train-balanced``);
            * ``geneval-style``: generated prompts in the style of GenEval;
            * a file, or the name of a published set (:mod:`noisear_rl.prompts.sets`); a repeated prompt in a file
              counts once;
            * any other string with a space between words: one prompt.

            ``None`` for the training captions (embedded denoisers) or a few examples (others).
        denoiser: Name of the denoiser.
        count: Number of prompts. A split and ``geneval-style`` give equal shares of the categories, with captions of
            small categories repeated; anything else gives its first prompts. ``None`` for all.
        skip_bad_rows: Skip malformed rows of a file with a warning.
        allow_test: Allow the split ``test``. Only ``noisear evaluate`` sets this, so that nothing is trained or chosen
            on the captions of published results.

    Raises:
        ValueError: If there is no prompt, one is empty, ``count`` is below 1, a file is malformed, or the split is
            ``test`` without ``allow_test``.
        FileNotFoundError: If a string without spaces is neither a split, a file, nor the name of a published set.
    """
    if count is not None and count < 1:
        raise ValueError(f"the number of prompts must be at least 1, got {count}")
    embedded = denoiser in EMBEDDED
    if prompts is None:
        prompts = "train" if embedded else EXAMPLE_PROMPTS
    if not isinstance(prompts, str):
        found = _as_they_are(prompts, count)
    elif embedded and prompts in (*SPLITS, *BALANCED):
        split = next(split for split in SPLITS if prompts.removesuffix("-balanced") == split)
        if split == "test" and not allow_test:
            raise ValueError(
                f"prompts: {prompts!r} is kept for published results, so that nothing is trained or chosen on it; only "
                f"`noisear evaluate` reads it. Use {prompts.replace('test', 'validation')!r}"
            )
        number = count or (BALANCED_COUNT if prompts in BALANCED else None)
        captions = balanced_captions(split, number) if number else captions_of(split)
        return PromptSet(f"shapes-{split}", [c.text for c in captions], [c.category for c in captions])
    elif prompts == "geneval-style":
        return geneval_style_prompts(-(-(count or 120) // len(CATEGORIES)))
    elif Path(prompts).is_dir() or Path(prompts).is_file() or prompts in PUBLISHED:
        found = load_prompt_set(prompts, skip_bad_rows=skip_bad_rows, limit=count)
    elif re.search(r"\S\s+\S", prompts):
        found = _as_they_are([prompts], count)
    else:
        splits = f", nor one of {[*SPLITS, *BALANCED]}" if embedded else ""
        raise FileNotFoundError(
            f"prompts: {prompts!r} is neither a file nor one of {sorted([*PUBLISHED, 'geneval-style'])}{splits}"
        )
    return dataclasses.replace(found, categories=categories_of(found.prompts)) if embedded else found


def _as_they_are(prompts: Sequence[str], count: int | None) -> PromptSet:
    if not prompts or any(not isinstance(prompt, str) or not prompt.strip() for prompt in prompts):
        raise ValueError("prompts must be a non-empty list of non-empty strings")
    chosen = list(prompts)[:count]
    return PromptSet("prompts", chosen, ["all"] * len(chosen))


def categories_of(prompts: Sequence[str]) -> list[str]:
    """GenEval category of each prompt; ``all`` for prompts outside the shapes world."""
    names = []
    for prompt in prompts:
        try:
            names.append(parse_caption(prompt).category)
        except ValueError:
            names.append("all")
    return names
