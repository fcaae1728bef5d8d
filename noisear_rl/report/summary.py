"""The numbers of a report: one row per group of methods, and the sentence that summarises them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from noisear_rl.evaluation.intervals import (
    Estimate,
    bootstrap,
    category_mean,
    category_means,
    holm,
    number,
    paired_difference,
    significance_mark,
    win_rate,
)
from noisear_rl.evaluation.results import Results
from noisear_rl.evaluation.tables import UNADJUSTED, compared, scorers
from noisear_rl.samplers import GAUSSIAN


@dataclass
class Row:
    """Numbers of one group; those of the judge are percentages if it returns only 0 and 1.

    Attributes:
        name: Name of the group.
        color: Index of the group, which selects its colour.
        seeds: Mean of the judge for each training seed.
        judge: Mean of the judge over training seeds, prompts and samples.
        gain: Paired difference from the baseline; ``None`` for the baseline.
        win_rate: Percentage of pairs won against the baseline, a tie being half a win; ``None`` for the baseline.
        scores: Means of the other scorers by name.
        categories: Mean of the judge by category.
        diversity: Mean pairwise distance of the images of a prompt; ``None`` if not measured.
        nfe: Network evaluations per image.
        seconds: Seconds per image; ``None`` if not measured.
        kl: Mean KL of the noise to N(0, I) in nats; ``None`` without a density.
        noise_mean: Mean over noise elements.
        noise_std: Standard deviation over noise elements.
    """

    name: str
    color: int
    seeds: list[float]
    judge: Estimate
    gain: Estimate | None
    win_rate: Estimate | None
    scores: dict[str, Estimate]
    categories: dict[str, float]
    diversity: Estimate | None
    nfe: float
    seconds: float | None
    kl: float | None
    noise_mean: float
    noise_std: float

    @property
    def significant(self) -> bool:
        """Whether the interval of the gain excludes 0, after Holm's correction if there are many gains."""
        return self.gain is not None and bool(significance_mark(self.gain))


def is_binary(results: Results) -> bool:
    """Returns whether the judge scores images only as right (1) or wrong (0)."""
    return all(np.isin(method.scores[results.judge], (0, 1)).all() for method in results.methods.values())


def table_rows(results: Results) -> list[Row]:
    """Returns the numbers of every group, the baseline first."""
    scale = 100.0 if is_binary(results) else 1.0
    categories, prompts, (judge, *others) = results.categories, results.prompts, scorers(results)
    start, seconds = results.methods[results.baseline], results.seconds_per_image()
    resample = results.config.get("resample", "prompts")
    estimate = lambda values: bootstrap(values, categories, prompts=prompts, resample=resample)
    mean = lambda values: float(np.mean(values)) if len(values) else None
    measure, rows = next(iter(start.diversity), ""), []
    for index, (group, members) in enumerate(results.groups.items()):
        methods, scores = [results.methods[name] for name in members], scale * results.by_seed(group, judge)
        baseline = scale * start.scores[judge]
        gain = paired_difference(scores, baseline, categories, prompts=prompts, resample=resample)
        apart = [method.diversity[measure] for method in methods if measure in method.diversity]
        rows.append(
            Row(
                group,
                index,
                [scale * category_mean(method.scores[judge], categories, prompts) for method in methods],
                estimate(scores),
                gain if index else None,
                estimate(compared(results, group, judge, win_rate)) if index else None,
                {name: estimate(results.by_seed(group, name)) for name in others},
                category_means(scores, categories, prompts),
                bootstrap(np.stack(apart)[..., None], categories, prompts=prompts) if apart else None,
                float(np.mean([method.nfe for method in methods])),
                mean([seconds[name] for name in members if name in seconds]),
                mean([method.kl_to_gaussian for method in methods if method.kl_to_gaussian is not None]),
                float(np.mean([method.noise_mean for method in methods])),
                float(np.mean([method.noise_std for method in methods])),
            )
        )
    gains = [row.gain for row in rows if row.gain is not None]
    if sum(not math.isnan(gain.p) for gain in gains) > UNADJUSTED:
        for row, adjusted in zip(rows[1:], holm(gains), strict=True):
            row.gain = adjusted
    return rows


def best_row(rows: Sequence[Row]) -> Row:
    """Returns the row with the highest judge score; the baseline only if there is no other row."""
    return max(rows[1:] or rows, key=lambda row: row.judge.mean)


def decimals(estimates: Sequence[Estimate | None]) -> int:
    """Returns the decimals that show two digits of the narrowest interval, or three if there is no interval."""
    widths = [estimate.high - estimate.low for estimate in estimates if estimate is not None]
    least = min((width for width in widths if width > 1e-9), default=0.05)
    return int(np.clip(1 - math.floor(math.log10(least)), 0, 5))


def judge_decimals(rows: Sequence[Row], *, binary: bool) -> int:
    """Returns the decimals of the judge's numbers; one for percentages."""
    return 1 if binary else decimals([estimate for row in rows for estimate in (row.judge, row.gain)])


def plain(value: float, digits: int) -> str:
    """Formats ``1.2`` or ``−1.2``, with a true minus sign."""
    return number(value, digits).replace("-", "−")


def signed(value: float, digits: int) -> str:
    """Formats ``+1.2`` or ``−1.2``, with a true minus sign."""
    return number(value, digits, "+").replace("-", "−")


def brief(value: float, digits: int = 3) -> str:
    """Formats ``0.278``, ``17`` or ``−1.05``: ``digits`` significant digits, with a true minus sign."""
    return f"{value:.{digits}g}".replace("-", "−")


def evidence(gain: Estimate, digits: int) -> str:
    """Describes the interval of a gain and whether it is significant."""
    if math.isnan(gain.low):
        return "too few images to rule out chance"
    mark = "significant" if significance_mark(gain) else "not significant"
    mark += "" if math.isnan(gain.adjusted) else " after Holm's correction"
    return f"95\u00a0% interval {signed(gain.low, digits)} to {signed(gain.high, digits)}, {mark}"


def verdict(rows: Sequence[Row], judge: str, *, binary: bool) -> str:
    """Summarises an evaluation in one sentence: the best method, its gain over the baseline and its cost."""
    base, best, digits = rows[0], best_row(rows), judge_decimals(rows, binary=binary)
    other_noise = f"{base.name} noise" if base.name == GAUSSIAN else base.name
    score = plain(best.judge.mean, digits)
    reached = f"gets {score}\u00a0% of the images right" if binary else f"scores {score} on {judge}"
    if best.gain is None:
        return f"Only {other_noise} was evaluated: it {reached}, and there is nothing to compare it with."
    unit = " points" if binary else ""
    gap = f"{plain(abs(best.gain.mean), digits)}{unit} {'more' if best.gain.mean >= 0 else 'less'} than {other_noise}"
    sentence = f"{best.name[:1].upper()}{best.name[1:]} {reached}, {gap} ({evidence(best.gain, digits)})"
    cost = f"{best.nfe:g} network evaluation{'' if best.nfe == 1 else 's'} per image"
    if math.isclose(best.nfe, base.nfe):
        return f"{sentence}, at equal cost: {cost}."
    sentence += f", but not at equal cost: {cost} instead of {base.nfe:g}"
    equal = [row for row in rows[1:] if math.isclose(row.nfe, base.nfe)]
    other = best_row(equal) if equal else None
    if other is None or other.gain is None:
        return sentence + "."
    gained = f"{signed(other.gain.mean, digits)}{unit} ({evidence(other.gain, digits)})"
    return f"{sentence}; at equal cost the best is {other.name}, {gained}."
