"""Means over categories with 95 % intervals, and what a pair of scores says about which image is better.

Rows of the same prompt are samples of one prompt, not independent prompts. The intervals of scores with several
training seeds cover a new training seed as well as new prompts.

Shapes: ``T`` training seeds, ``P`` rows with a prompt each, ``S`` samples per row, ``R`` data sets per call, ``D``
bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from noisear_rl.evaluation.quantiles import (
    Z,
    accelerated_level,
    column_quantiles,
    resampled_sums,
    student_quantile,
    student_tail,
)

Resample = Literal["prompts", "noise"]
MAX_ACCELERATION = 0.2  # beyond this, the skewness of a small sample is a guess
LEVEL = 0.05  # of the marks
FEW, BORROWED = 6, 2  # a category of fewer prompts knows its variance badly: so many degrees of freedom are borrowed


@dataclass
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: The mean.
        low: Lower bound; NaN if the data do not determine a spread.
        high: Upper bound, likewise.
        p: Two-sided p-value of a mean of 0, below 0.05 where the interval excludes 0.
        adjusted: The p-value after Holm's correction (:func:`holm`); NaN if it was not adjusted.
    """

    mean: float
    low: float
    high: float
    p: float = math.nan
    adjusted: float = math.nan

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0; false without bounds."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 1, sign: str = "") -> str:
        """Formats ``mean [low, high]``, or the mean alone if there are no bounds; ``sign="+"`` signs the mean."""
        low, high = number(self.low, digits), number(self.high, digits)
        return number(self.mean, digits, sign) + ("" if math.isnan(self.low) else f" [{low}, {high}]")

    def __str__(self) -> str:
        return self.text()


def number(value: float, digits: int | None, sign: str = "") -> str:
    """Formats a number with ``digits`` decimals, or up to six significant digits for ``None``; never minus zero."""
    return f"{value + 0.0:{sign}.6g}" if digits is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def significance_mark(estimate: Estimate) -> str:
    """Returns ``*`` if the 95 % interval excludes 0, and Holm's correction, if made, keeps it; otherwise ``""``."""
    kept = math.isnan(estimate.adjusted) or estimate.adjusted < LEVEL
    return "*" if estimate.excludes_zero and kept else ""


def holm(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Adjusts p-values for the number of comparisons (Holm 1979).

    With marks at adjusted p-values below 0.05, the probability that any of them is wrong is at most 5 %.

    Args:
        estimates: The comparisons; those without bounds do not count.

    Returns:
        The same estimates with ``adjusted`` set, in order.
    """
    tested = sorted((e.p, i) for i, e in enumerate(estimates) if not math.isnan(e.p))
    found, largest = list(estimates), 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        found[i] = replace(estimates[i], adjusted=largest)
    return found


def check_pair(scores: np.ndarray, baseline: np.ndarray) -> None:
    """Raises ``ValueError`` unless both have the same prompts and samples; the baseline may lack training seeds."""
    if np.shape(baseline) not in (np.shape(scores), np.shape(scores)[-2:]):
        raise ValueError(
            f"paired scores need the same prompts and samples: got {np.shape(scores)} against {np.shape(baseline)}"
        )


def win_rate(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Returns the winner of each pair: 1 for the method, 0 for the baseline, 0.5 for a tie.

    Args:
        scores: ``(P, S)`` or ``(T, P, S)`` of a method.
        baseline: ``(P, S)`` of Gaussian noise for the same prompts and samples.

    Returns:
        In the shape of ``scores``; 0.5 everywhere for a method against itself.

    Raises:
        ValueError: If the shapes differ.
    """
    check_pair(scores, baseline)
    return 0.5 + 0.5 * np.sign(scores - baseline)


def preference_probability(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Returns the probability that the method's image is preferred: a softmax over two scores, ``sigmoid(difference)``.

    PickScore (arXiv 2305.01569) and MPS (arXiv 2405.14705) were trained to predict it; it is meaningful only for scores
    of the form ``exp(logit_scale) · cos(text, image)``.

    Args:
        scores: ``(P, S)`` or ``(T, P, S)`` of a method.
        baseline: ``(P, S)`` of Gaussian noise for the same prompts and samples.

    Returns:
        Values in [0, 1] in the shape of ``scores``.

    Raises:
        ValueError: If the shapes differ.
    """
    check_pair(scores, baseline)
    return 0.5 + 0.5 * np.tanh(0.5 * (scores - baseline))  # sigmoid without overflow


def rows_by_prompt(categories: Sequence[str], prompts: Sequence[str] | None = None) -> dict[str, list[list[int]]]:
    """Returns the rows of every distinct prompt by category, in order of first appearance.

    Args:
        categories: ``P`` names.
        prompts: ``P`` prompts; ``None`` if no prompt is repeated.

    Raises:
        ValueError: If the lengths differ, or a prompt is in two categories.
    """
    if prompts is None:
        return {name: [[i] for i, c in enumerate(categories) if c == name] for name in dict.fromkeys(categories)}
    if len(prompts) != len(categories):
        raise ValueError(f"expected one prompt per category name, got {len(prompts)} and {len(categories)}")
    category_of = dict(zip(prompts, categories, strict=True))
    found: dict[str, dict[str, list[int]]] = {}
    for i, (name, prompt) in enumerate(zip(categories, prompts, strict=True)):
        if category_of[prompt] != name:
            raise ValueError(f"{prompt!r} is in two categories: {name!r} and {category_of[prompt]!r}")
        found.setdefault(name, {}).setdefault(prompt, []).append(i)
    return {name: list(rows.values()) for name, rows in found.items()}


def prompt_means(scores: np.ndarray, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Averages scores ``(…, P, S)`` over the samples of each of ``K`` distinct prompts: ``(…, K)``."""
    each = scores.mean(-1)
    return np.stack([each[..., part].mean(-1) for part in rows], -1)


def category_means(
    scores: np.ndarray, categories: Sequence[str], prompts: Sequence[str] | None = None
) -> dict[str, float]:
    """Returns the mean of ``(P, S)`` or ``(T, P, S)`` scores by category, in order of first appearance.

    Every distinct prompt of a category has the same weight, however often it is repeated; see :func:`rows_by_prompt`.
    """
    groups = rows_by_prompt(categories, prompts)
    return {name: float(prompt_means(np.asarray(scores), rows).mean()) for name, rows in groups.items()}


def category_mean(scores: np.ndarray, categories: Sequence[str], prompts: Sequence[str] | None = None) -> float:
    """Returns the mean of :func:`category_means` with equal weight per category, as in GenEval (arXiv 2310.11513)."""
    return float(np.mean(list(category_means(scores, categories, prompts).values())))


def bootstrap(
    scores: np.ndarray,
    categories: Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    resample: Resample = "prompts",
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimates the mean over categories with a 95 % bootstrap interval.

    The interval is Efron's BCa (1987), whose bias and acceleration are both a sixth of the mean's skewness, widened
    from the normal to the Student quantile (Hesterberg, arXiv 1411.5279, on bootstraps that are too narrow for small
    samples) with Welch-Satterthwaite degrees of freedom. It covers 94 to 95 % where the percentile interval covers 92 %
    (30 prompts in six categories), and 93 to 97 % with 30 to 200 prompts, 1 to 8 samples and 50 to 80 % right images.
    A single 0/1 score for each of 30 prompts takes so few values that coverage is 94 to 98 %. Estimates that depend on
    a handful of images need more prompts: with 30, shares above 90 % and rare differences are covered in 90 to 94 %.
    A category of fewer than six prompts is taken to vary at least as much as if two more degrees of freedom had the
    largest variance of a larger category: two prompts that agree by chance do not make it certain.

    Scores of several training seeds also cover a new training seed: the squared standard error is that of the mean
    over seeds, plus ``s² / T`` with the variance ``s²`` of the seeds' means, and both count in the degrees of freedom.
    The noise within a seed is in both parts, so the interval is a little wide: it covers 94 to 99 % with 3 or 5 seeds
    whose true means have a standard deviation of 0 to 3 points, 60 to 133 prompts in six categories of 2 to 40, and 50
    to 90 % right images. With one training seed, the interval covers new prompts only.

    Args:
        scores: ``(P, S)``, or ``(T, P, S)`` of ``T`` training seeds. The difference of two methods' scores gives the
            paired interval.
        categories: ``P`` names; every category has the same weight.
        prompts: ``P`` prompts; rows of the same prompt are samples of one prompt. ``None`` if no prompt is repeated.
        resample: What the interval generalises to. ``prompts``: new prompts like these (resamples distinct prompts
            within each category). ``noise``: new noise for these same prompts (resamples within each prompt).
        draws: Bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        The estimate. Its bounds are NaN if they cannot be known: with ``prompts``, if a category has a single distinct
        prompt, whose samples say nothing about other prompts; with ``noise``, if a prompt has one sample.

    Raises:
        ValueError: If ``resample`` is unknown, the shapes do not match, or a score is not finite.
    """
    found = bootstrap_many(
        np.asarray(scores)[None], categories, prompts=prompts, resample=resample, draws=draws, seed=seed
    )
    return Estimate(*(float(value[0]) for value in found))


def paired_difference(
    scores: np.ndarray,
    baseline: np.ndarray,
    categories: Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    resample: Resample = "prompts",
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimates the mean gain of a method over a baseline, with the interval of the paired difference.

    Args:
        scores: ``(P, S)``, or ``(T, P, S)`` of ``T`` training seeds.
        baseline: ``(P, S)`` of a method without training, such as Gaussian noise, for the same prompts and samples; or
            ``(T, P, S)`` of another trained method.
        categories: ``P`` names; every category has the same weight.
        prompts: See :func:`bootstrap`.
        resample: See :func:`bootstrap`.
        draws: Bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the shapes differ; see also :func:`bootstrap`.
    """
    check_pair(scores, baseline)
    return bootstrap(scores - baseline, categories, prompts=prompts, resample=resample, draws=draws, seed=seed)


def bootstrap_many(
    scores: np.ndarray,
    categories: Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    resample: Resample = "prompts",
    draws: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Applies :func:`bootstrap` to ``(R, P, S)`` or ``(R, T, P, S)`` scores with shared draws.

    Returns:
        Means, lower bounds, upper bounds and p-values, each ``(R,)``.
    """
    if resample not in get_args(Resample):
        raise ValueError(f"unknown resample {resample!r}; expected one of {get_args(Resample)}")
    if scores.ndim not in (3, 4) or scores.shape[-2] != len(categories) or not scores.size:
        raise ValueError(f"expected scores ({len(categories)}, S), one row per category name, got {scores.shape[1:]}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite: found NaN or infinity")
    scores = scores if scores.ndim == 4 else scores[:, None]
    by_category = rows_by_prompt(categories, prompts)
    by_seed = np.mean([prompt_means(scores, rows).mean(-1) for rows in by_category.values()], 0)  # (R, T)
    mean, seeds, rng = by_seed.mean(1), by_seed.shape[1], np.random.default_rng(seed)
    variance, skew, squares = np.zeros((3, len(scores)))
    drawn, known, normal = np.zeros((draws, len(scores))), True, np.zeros(len(scores))
    parts = list(_items(scores.mean(1), by_category, resample))
    large = [part.var(2, ddof=1) for part, _ in parts if resample == "prompts" and part.shape[2] >= FEW]
    for part, weight in parts:
        n = part.shape[2]
        if n == 1:
            known = False
            continue
        rest = part - part.mean(2, keepdims=True)
        # Resampling n items understates their variance by (n - 1) / n.
        drawn += resampled_sums(rest, draws, rng) * (weight / n * math.sqrt(n / (n - 1)))
        item, freedom = (rest**2).sum(2) / (n - 1), n - 1  # variance of the items of each group, (R, groups)
        if large and n < FEW:
            own, freedom = item, n - 1 + BORROWED
            item = np.maximum(own, (own * (n - 1) + np.max(large, axis=0) * BORROWED) / freedom)
            normal += (item - own).sum(1) * weight**2 / n
        item = item * weight**2 / n  # of each group's share of the mean
        variance += item.sum(1)
        squares += (item**2).sum(1) / freedom
        skew += (rest**3).sum((1, 2)) * (weight / n) ** 3
    if not known:
        return mean, *np.full((3, len(mean)), np.nan)
    if seeds > 1:  # too few to resample
        of_seeds = by_seed.var(1, ddof=1) / seeds
        normal += of_seeds
        variance += of_seeds
        squares += of_seeds**2 / (seeds - 1)
    drawn += rng.standard_normal((draws, 1)) * np.sqrt(normal)
    varies = variance > 1e-24  # constant scores leave a rounding error
    safe = np.where(varies, variance, 1.0)
    acceleration = np.where(varies, skew / (6 * safe**1.5), 0.0).clip(-MAX_ACCELERATION, MAX_ACCELERATION)
    total = safe**2 / np.where(varies, squares, 1.0)  # Welch-Satterthwaite degrees of freedom
    quantile = student_quantile(total)
    drawn.sort(axis=0)
    low, high = (mean + quantile / Z * column_quantiles(drawn, accelerated_level(acceleration, z)) for z in (-Z, Z))
    side = np.where(mean > 0, mean - low, high - mean)  # the half of the interval that faces 0
    p = student_tail(np.abs(mean) / np.where(varies, side, 1.0) * quantile, total)
    constant = (mean, mean, np.where(np.abs(mean) > 1e-12, 0.0, 1.0))
    return mean, *(np.where(varies, found, fixed) for found, fixed in zip((low, high, p), constant, strict=True))


def _items(
    scores: np.ndarray, by_category: dict[str, list[list[int]]], resample: Resample
) -> Iterator[tuple[np.ndarray, float]]:
    """Yields what is resampled, ``(R, groups, n)`` items within each group, and the weight of a group's mean."""
    for rows in by_category.values():
        if resample == "prompts":
            yield prompt_means(scores, rows)[:, None], 1 / len(by_category)
            continue
        for repeats in {len(part) for part in rows}:
            alike = np.array([part for part in rows if len(part) == repeats])  # (groups, repeats)
            yield scores[:, alike].reshape(len(scores), len(alike), -1), 1 / (len(rows) * len(by_category))
