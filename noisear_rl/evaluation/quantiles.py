"""Bootstrap sums and the quantiles of intervals; see :func:`noisear_rl.evaluation.intervals.bootstrap`.

Shapes: ``R`` data sets per call, ``D`` bootstrap draws.
"""

from __future__ import annotations

import math

import numpy as np

Z = 1.959964  # the 97.5 % quantile of N(0, 1)


def resampled_sums(items: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Sums items ``(R, groups, n)`` drawn with replacement within each group: ``(D, R)``."""
    groups, n = items.shape[1:]
    chosen = rng.integers(n, size=(draws, groups, n)) + n * np.arange(groups)[:, None]
    chosen = chosen.reshape(draws, -1) + groups * n * np.arange(draws)[:, None]
    counts = np.bincount(chosen.ravel(), minlength=draws * groups * n).reshape(draws, -1)
    return counts @ items.reshape(len(items), -1).T


def accelerated_level(acceleration: np.ndarray, z: float) -> np.ndarray:
    """Returns the BCa level for the normal quantile ``z``; the bias correction of a mean equals its acceleration."""
    shifted = acceleration + z
    points = acceleration + shifted / (1 - acceleration * shifted)
    return np.array([0.5 + 0.5 * math.erf(point / math.sqrt(2)) for point in points])


def student_quantile(freedom: np.ndarray) -> np.ndarray:
    """The 97.5 % quantile of Student's t (Abramowitz & Stegun 26.7.5), within 1 % from 1 degree of freedom on."""
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    rest = math.tan(0.475 * math.pi) - Z - sum(terms)  # makes 1 degree of freedom exact
    return Z + sum((term / freedom**power for power, term in enumerate((*terms, rest), 1)), np.zeros_like(freedom))


def student_tail(t: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Returns the probability that Student's t is beyond ``±t``, for at least 1 degree of freedom.

    With ``t = √f · tan θ``, the density is proportional to ``cos(θ)^(f - 1)``.
    """
    freedom = np.minimum(freedom, 1e6)[..., None]
    start = np.arctan(t[..., None] / np.sqrt(freedom))
    width = np.minimum(math.pi / 2 - start, 12 / np.sqrt(freedom))  # nothing is left beyond
    nodes, weights = np.polynomial.legendre.leggauss(64)
    power = (freedom - 1) * np.log(np.cos(start + width * (nodes + 1) / 2))
    half = np.array([math.lgamma((f + 1) / 2) - math.lgamma(f / 2) for f in freedom.ravel()]).reshape(t.shape)
    return (weights * np.exp(power)).sum(-1) * width[..., 0] / math.sqrt(math.pi) * np.exp(half)


def column_quantiles(ordered: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Returns one interpolated quantile per column of ``(D, R)`` values in ascending order: ``(R,)``."""
    rank = levels * (len(ordered) - 1)
    below = np.floor(rank).astype(int).clip(0, max(len(ordered) - 2, 0))
    above = np.minimum(below + 1, len(ordered) - 1)
    columns = np.arange(ordered.shape[1])
    return ordered[below, columns] + (rank - below) * (ordered[above, columns] - ordered[below, columns])
