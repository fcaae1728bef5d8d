"""Episodes to train on again: those of a run's newest updates, and rollouts that were there before.

Shapes: ``E`` episodes, ``N`` patches, ``A`` elements per patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Episodes:
    """Finished episodes, on the CPU.

    Attributes:
        prompts: ``E``, one per episode.
        patches: ``(E, N, A)`` float16, as on disk.
        rewards: ``(E,)``.
        rows: The rows of each prompt.
    """

    prompts: list[str]
    patches: torch.Tensor
    rewards: torch.Tensor
    rows: dict[str, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.patches, self.rewards, self.rows = self.patches.half().cpu(), self.rewards.cpu(), {}
        for row, prompt in enumerate(self.prompts):
            self.rows.setdefault(prompt, []).append(row)


class Replay:
    """Draws episodes by prompt. All processes hold the same ones, and draw the same.

    Args:
        updates: Newest updates to keep.
        rollouts: Episodes that are never dropped and not part of checkpoints.
    """

    def __init__(self, updates: int, rollouts: Episodes | None = None):
        self.updates, self.rollouts = updates, rollouts
        self.kept: list[Episodes] = []

    def add(self, prompts: Sequence[str], patches: torch.Tensor, rewards: torch.Tensor) -> None:
        """Keeps the episodes ``(E, N, A)`` of an update, and drops those of the oldest one if it is full."""
        if self.updates:
            self.kept = [*self.kept, Episodes(list(prompts), patches, rewards)][-self.updates :]

    def draw(self, rng: np.random.Generator, prompts: int, samples: int) -> Episodes | None:
        """Up to ``samples`` episodes of each of up to ``prompts`` distinct prompts; ``None`` if there are none."""
        sources = [*([self.rollouts] if self.rollouts else []), *self.kept]
        known = list(dict.fromkeys(prompt for source in sources for prompt in source.rows))
        found: list[tuple[Episodes, int]] = []
        for index in rng.permutation(len(known))[:prompts]:
            every = [(source, row) for source in sources for row in source.rows.get(known[index], ())]
            found += [every[i] for i in rng.permutation(len(every))[:samples]]
        if not found:
            return None
        patches, rewards = (
            torch.stack([getattr(source, name)[row] for source, row in found]) for name in ("patches", "rewards")
        )
        return Episodes([source.prompts[row] for source, row in found], patches, rewards)

    def state_dict(self) -> dict[str, Any]:
        """The episodes of the run itself."""
        return {name: [getattr(part, name) for part in self.kept] for name in ("prompts", "patches", "rewards")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        parts = zip(state["prompts"], state["patches"], state["rewards"], strict=True)
        self.kept = [Episodes(*part) for part in parts]
