"""Pairs of several layouts per prompt, of which training draws one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class LayoutRows:
    """The rows of every prompt in a table of pairs.

    Args:
        prompts: The prompt of every row.
        layouts: The layout of every row; a row that repeats another one makes its prompt count more.
    """

    def __init__(self, prompts: Sequence[str], layouts: Sequence[int]):
        rows: dict[str, dict[int, int]] = {}  # by prompt: the row of each of its layouts
        is_lead = []
        for row, (prompt, layout) in enumerate(zip(prompts, layouts, strict=True)):
            own = rows.setdefault(prompt, {})
            own.setdefault(layout, row)
            is_lead.append(next(iter(own)) == layout)
        self.layout, self._is_lead = np.array(layouts), np.array(is_lead)
        self._rows = [np.array(list(rows[prompt].values())) for prompt in prompts]

    def leads(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that hold their prompt's first layout: every prompt as often as it counts."""
        return rows[self._is_lead[rows]]

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each of the rows one of its prompt's rows, all layouts alike."""
        return np.array([rng.choice(self._rows[row]) for row in rows])
