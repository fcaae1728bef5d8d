"""How well predictions order what belongs to one prompt.

Shapes: ``R`` rows, each with the number of its prompt.
"""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((2 * ends - counts - 1) / 2)[inverse]


def rank_correlation(predicted: np.ndarray, rewards: np.ndarray, prompt: np.ndarray) -> float:
    """Mean over prompts of Spearman's rank correlation; prompts whose rewards or predictions are all equal count 0.

    Args:
        predicted: ``(R,)``.
        rewards: ``(R,)``.
        prompt: ``(R,)``.
    """
    found = []
    for rows in _by_prompt(prompt):
        a, b = (x - x.mean() for x in (ranks(predicted[rows]), ranks(rewards[rows])))
        scale = np.sqrt((a @ a) * (b @ b))
        found.append(float(a @ b / scale) if scale > 0 else 0.0)
    return float(np.mean(found))


def choice_gain(predicted: np.ndarray, rewards: np.ndarray, prompt: np.ndarray) -> float:
    """Reward of each prompt's row of the highest prediction, from 0 (the mean of its rows) to 1 (its best row).

    The mean over prompts of the gain, divided by the mean of the largest possible gain; 0 if there is none.

    Args:
        predicted: ``(R,)``.
        rewards: ``(R,)``.
        prompt: ``(R,)``.
    """
    gained = possible = 0.0
    for rows in _by_prompt(prompt):
        own = rewards[rows]
        gained += own[predicted[rows].argmax()] - own.mean()
        possible += own.max() - own.mean()
    return float(gained / possible) if possible > 0 else 0.0


def _by_prompt(prompt: np.ndarray) -> list[np.ndarray]:
    """The rows of each prompt."""
    order = np.argsort(prompt, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(prompt[order])) + 1)
