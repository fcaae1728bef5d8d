"""Preference pairs from rollouts: which of two noises for a prompt earned the higher reward.

Shapes: ``R`` rollouts, ``P`` pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from noisear_rl.data.rollouts import Rollouts

Strategy = Literal["best_worst", "all_above_margin"]


@dataclass
class PreferencePairs:
    """Pairs of rollouts of the same prompt.

    Attributes:
        chosen: ``(P,)`` row numbers of the better rollouts.
        rejected: ``(P,)`` row numbers of the worse rollouts.
        prompts: Number of prompts.
        used: Number of prompts with at least one pair.
        ties: Prompts (``best_worst``) or pairs (``all_above_margin``) of equal reward, dropped.
        below: Prompts or pairs whose difference is above 0 but does not exceed the threshold, dropped.
        margin: Mean difference in reward over the pairs.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    prompts: int
    used: int
    ties: int
    below: int
    margin: float

    def __len__(self) -> int:
        return len(self.chosen)

    def __str__(self) -> str:
        return (
            f"{len(self)} pairs from {self.used} of {self.prompts} prompts, mean margin {self.margin:.3f}; "
            f"dropped {self.ties} ties and {self.below} below the threshold"
        )


def preference_pairs(
    rollouts: Rollouts, threshold: float = 0.0, strategy: Strategy = "best_worst", seed: int = 0
) -> PreferencePairs:
    """Makes pairs within each prompt, never across prompts (NoiseAR, appendix D: best and worst of a prompt).

    Args:
        rollouts: ``R`` rollouts.
        threshold: The rewards of a pair must differ by more than this. Ties never make a pair.
        strategy: ``best_worst``: one pair per prompt. ``all_above_margin``: every pair above the threshold.
        seed: Seed of the choice among equally good rollouts.

    Raises:
        ValueError: If the strategy is unknown, the threshold is negative or NaN, or no pair exceeds it; the message
            reports the spread of rewards and suggests a threshold.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"unknown strategy {strategy!r}; expected one of {get_args(Strategy)}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    rewards, rng = rollouts.rewards, np.random.default_rng(seed)
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(rollouts.prompts):
        groups.setdefault(prompt, []).append(row)
    chosen: list[int] = []
    rejected: list[int] = []
    spreads, used, ties, below = [], 0, 0, 0
    for rows in groups.values():
        order = rng.permutation(rows)
        order = order[np.argsort(rewards[order], kind="stable")]  # worst first, ties in random order
        spreads.append(float(rewards[order[-1]] - rewards[order[0]]))
        if strategy == "best_worst":
            better, worse = order[-1:], order[:1]
        else:
            low, high = np.triu_indices(len(order), 1)
            better, worse = order[high], order[low]
        difference = rewards[better] - rewards[worse]
        keep = (difference > threshold) & (difference > 0)
        ties += int((difference <= 0).sum())
        below += int(((difference > 0) & ~keep).sum())
        used += bool(keep.any())
        chosen += better[keep].tolist()
        rejected += worse[keep].tolist()
    if not chosen:
        middle, most = float(np.median(spreads)), max(spreads)
        advice = (
            f"try a threshold of {0.5 * middle or 0.5 * most:.3g}"
            if most > 0
            else "all rewards of every prompt are equal: collect more samples per prompt, or use another reward"
        )
        raise ValueError(
            f"no pair differs by more than {threshold}: best minus worst of a prompt has median {middle:.3g} and "
            f"maximum {most:.3g} over {len(groups)} prompts; {advice}"
        )
    margin = float((rewards[chosen] - rewards[rejected]).mean())
    return PreferencePairs(np.array(chosen), np.array(rejected), len(groups), used, ties, below, margin)
