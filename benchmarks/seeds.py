"""Table rows of benchmarks with several training seeds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from noisear_rl.evaluation.intervals import Estimate

SEEDS = (0, 1, 2)
HEAD = (
    "| method | training images | "
    + " | ".join(f"seed {seed}" for seed in SEEDS)
    + " | pooled | gain | std of seeds | KL | diversity |\n"
    + "|---" * (7 + len(SEEDS))
    + "|"
)


def signed(estimate: Estimate) -> str:
    """Formats the estimate of a difference with its sign."""
    return f"{'+' if estimate.mean >= 0 else ''}{estimate}"


def baseline_rows(gaussian: Estimate, best_of_4: Estimate) -> list[str]:
    """Returns the rows of Gaussian noise, at equal cost and at four times the cost."""
    empty = " |" * len(SEEDS)
    return [
        f"| Gaussian | 0 |{empty} {gaussian} | | | 0 | 1.00 |",
        f"| Gaussian, best of 4 by the training reward (4 x the cost) | 0 |{empty} {best_of_4} "
        f"| {best_of_4.mean - gaussian.mean:+.1f} | | 0 | |",
    ]


def seeds_row(
    title: str,
    images: int,
    scores: np.ndarray,
    baseline: np.ndarray,
    estimate: Callable[[np.ndarray], Estimate],
    kl: float,
    diversity: float,
) -> str:
    """Returns the row of a method.

    Args:
        title: Name of the method.
        images: Images denoised to train it.
        scores: ``(seeds, P, S)`` in %.
        baseline: ``(P, S)`` of Gaussian noise with the same seeds.
        estimate: Estimates mean and interval of ``(P, S)`` scores.
        kl: Mean KL to N(0, I) in nats per noise.
        diversity: Diversity relative to Gaussian noise.
    """
    each, pooled = [estimate(part) for part in scores], scores.mean(0)
    return (
        f"| {title} | {images:,} | "
        + " | ".join(str(part) for part in each)
        + f" | {estimate(pooled)} | {signed(estimate(pooled - baseline))} "
        + f"| {np.std([part.mean for part in each], ddof=1):.1f} | {kl:.0f} | {diversity:.2f} |"
    )
