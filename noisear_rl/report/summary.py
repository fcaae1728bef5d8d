"""The figures of a report: a row for every group of methods, and the sentence that sums them up."""

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
    number,
    paired_difference,
    significance_mark,
    win_rate,
)
from noisear_rl.evaluation.results import Results
from noisear_rl.evaluation.tables import compared, scorers
from noisear_rl.samplers import GAUSSIAN


@dataclass
class Row:
    """A group's figures; the judge's in percent where it says right or wrong.

    Attributes:
        name: The group.
        color: Its place in the order, which is its colour.
        seeds: The judge's mean of each training seed.
        judge: Over training seeds, prompts and samples.
        gain: Paired difference to the baseline; ``None`` for the baseline.
        win_rate: Share of pairs won against the baseline in percent, ties half; ``None`` for the baseline.
        scores: The other scorers.
        categories: The judge's mean by category.
        diversity: Mean pairwise distance of a prompt's pictures; ``None`` where it was not measured.
        nfe: Network evaluations a picture.
        seconds: Of making a picture; ``None`` where it was not measured.
        kl: To N(0, I) in nats; ``None`` without a density.
        noise_mean: Mean of noise elements.
        noise_std: Standard deviation of noise elements.
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
        """Whether the interval of the gain excludes 0."""
        return self.gain is not None and bool(significance_mark(self.gain))


def is_binary(results: Results) -> bool:
    """Whether the judge says right or wrong (1 or 0) and nothing between."""
    return all(np.isin(method.scores[results.judge], (0, 1)).all() for method in results.methods.values())


def table_rows(results: Results) -> list[Row]:
    """The figures of every group, the baseline's first."""
    scale = 100.0 if is_binary(results) else 1.0
    categories, (judge, *others) = results.categories, scorers(results)
    start, seconds = results.methods[results.baseline], results.seconds_per_image()
    resample = results.config.get("resample", "prompts")
    estimate = lambda values: bootstrap(values, categories, resample=resample)
    mean = lambda values: float(np.mean(values)) if len(values) else None
    measure, rows = next(iter(start.diversity), ""), []
    for index, (group, members) in enumerate(results.groups.items()):
        methods, scores = [results.methods[name] for name in members], scale * results.pooled(group, judge)
        gain = paired_difference(scores, scale * start.scores[judge], categories, resample=resample)
        apart = [method.diversity[measure] for method in methods if measure in method.diversity]
        rows.append(
            Row(
                group,
                index,
                [scale * category_mean(method.scores[judge], categories) for method in methods],
                estimate(scores),
                gain if index else None,
                estimate(compared(results, group, judge, win_rate)) if index else None,
                {name: estimate(results.pooled(group, name)) for name in others},
                category_means(scores, categories),
                bootstrap(np.mean(apart, axis=0)[:, None], categories) if apart else None,
                float(np.mean([method.nfe for method in methods])),
                mean([seconds[name] for name in members if name in seconds]),
                mean([method.kl_to_gaussian for method in methods if method.kl_to_gaussian is not None]),
                float(np.mean([method.noise_mean for method in methods])),
                float(np.mean([method.noise_std for method in methods])),
            )
        )
    return rows


def best_row(rows: Sequence[Row]) -> Row:
    """The row with the best judge score, the baseline's only where it is alone."""
    return max(rows[1:] or rows, key=lambda row: row.judge.mean)


def decimals(estimates: Sequence[Estimate | None]) -> int:
    """How many decimals figures need: two digits of the narrowest interval, three decimals where there is none."""
    widths = [estimate.high - estimate.low for estimate in estimates if estimate is not None]
    least = min((width for width in widths if width > 1e-9), default=0.05)
    return int(np.clip(1 - math.floor(math.log10(least)), 0, 5))


def judge_decimals(rows: Sequence[Row], *, binary: bool) -> int:
    """Decimals of the judge's figures; one for percent."""
    return 1 if binary else decimals([estimate for row in rows for estimate in (row.judge, row.gain)])


def plain(value: float, digits: int) -> str:
    """``1.2`` or ``−1.2`` with a true minus sign."""
    return number(value, digits).replace("-", "−")


def signed(value: float, digits: int) -> str:
    """``+1.2`` or ``−1.2`` with a true minus sign."""
    return number(value, digits, "+").replace("-", "−")


def brief(value: float, digits: int = 3) -> str:
    """``0.278``, ``17`` or ``−1.05``: a few significant digits, with a true minus sign."""
    return f"{value:.{digits}g}".replace("-", "−")


def evidence(gain: Estimate, digits: int) -> str:
    """The interval of a gain and whether it is significant, in words."""
    if math.isnan(gain.low):
        return "too few pictures to say whether by chance"
    mark = "significant" if significance_mark(gain) else "not significant"
    return f"95\u00a0% interval {signed(gain.low, digits)} to {signed(gain.high, digits)}, {mark}"


def verdict(rows: Sequence[Row], judge: str, *, binary: bool) -> str:
    """What the evaluation found, in one sentence: the best method, its gain on the baseline, at which cost."""
    base, best, digits = rows[0], best_row(rows), judge_decimals(rows, binary=binary)
    other_noise = f"{base.name} noise" if base.name == GAUSSIAN else base.name
    score = plain(best.judge.mean, digits)
    reached = f"gets {score}\u00a0% of the pictures right" if binary else f"scores {score} on {judge}"
    if best.gain is None:
        return f"Only {other_noise} was evaluated: it {reached}, and there is nothing to compare it with."
    unit = " points" if binary else ""
    gap = f"{plain(abs(best.gain.mean), digits)}{unit} {'more' if best.gain.mean >= 0 else 'less'} than {other_noise}"
    sentence = f"{best.name[:1].upper()}{best.name[1:]} {reached}, {gap} ({evidence(best.gain, digits)})"
    cost = f"{best.nfe:g} network evaluation{'' if best.nfe == 1 else 's'} a picture"
    if math.isclose(best.nfe, base.nfe):
        return f"{sentence}, at equal cost: {cost}."
    sentence += f", but not at equal cost: {cost} instead of {base.nfe:g}"
    equal = [row for row in rows[1:] if math.isclose(row.nfe, base.nfe)]
    other = best_row(equal) if equal else None
    if other is None or other.gain is None:
        return sentence + "."
    gained = f"{signed(other.gain.mean, digits)}{unit} ({evidence(other.gain, digits)})"
    return f"{sentence}; at equal cost the best is {other.name}, {gained}."
