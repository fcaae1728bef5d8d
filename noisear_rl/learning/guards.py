"""Guards of a training: what would ruin a network does not happen, is counted, and ends the run if it goes on.

An update whose loss or gradient is not finite is skipped. One that moves a policy too far, or to where its density is
not finite, is undone: parameters and optimiser are put back. After :data:`IN_A_ROW` of them the run ends with a
diagnosis; its checkpoints are of networks whose figures were finite. All processes decide alike, from what they share.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from noisear_rl.checkpoints import check_finite
from noisear_rl.distributed import is_main
from noisear_rl.learning.run import Counters
from noisear_rl.rewards import WeightedReward

if TYPE_CHECKING:
    from noisear_rl.learning.natural_gradient import PolicyOptimizer

IN_A_ROW = 10  # skipped updates that end a run
LARGEST_KL = 100.0  # nats per noise that an update may move a policy, or 10 times its intended size if that is more
WINDOW = 20  # records whose means are compared
SURE = 3.0  # standard errors by which they must differ


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no value of any tensor is NaN or infinite."""
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all())


def finite_gradients(network: nn.Module) -> bool:
    """Whether all gradients are finite, so that a step may be taken."""
    return all_finite(p.grad for p in network.parameters() if p.grad is not None)


class DivergedError(ValueError):
    """A training does not recover by itself."""


class Guard:
    """Watches the updates of a network.

    Args:
        network: The network that is trained.
        counters: The run's progress, which counts the skipped updates.
        optimizer: What changes a policy, for :meth:`remember` and :meth:`settle`.
        size: How far an update is meant to move a policy at most, in nats per noise, for :meth:`settle`.

    Raises:
        ValueError: If the network holds NaN or infinite parameters.
    """

    def __init__(
        self,
        network: nn.Module,
        counters: Counters,
        optimizer: PolicyOptimizer | None = None,
        size: float = 0.0,
    ):
        check_finite(network)
        self.network, self.counters, self.optimizer = network, counters, optimizer
        self.largest_kl = max(LARGEST_KL, 10 * size)
        self._before: tuple[list[torch.Tensor], dict[str, Any]] | None = None

    def accepts(self, *values: torch.Tensor) -> bool:
        """Whether a step may be taken: all values (loss, norm of the gradient) are finite. If not, skip it.

        Raises:
            DivergedError: If too many updates in a row were skipped.
        """
        fine = all_finite(values)
        self._count(None if fine else "loss or gradient are not finite")
        return fine

    @torch.no_grad()
    def remember(self) -> None:
        """Keeps a copy of the policy and its optimiser, for :meth:`settle`."""
        assert self.optimizer is not None
        parameters = [parameter.detach().clone() for parameter in self.network.parameters()]
        self._before = parameters, copy.deepcopy(self.optimizer.state_dict())

    @torch.no_grad()
    def settle(self, kl: float) -> float:
        """Undoes the update since :meth:`remember` if it blew up.

        Args:
            kl: How far it moved the policy in nats per noise; NaN if its gradient or the new density is not finite.

        Returns:
            How far the policy has moved: ``kl``, or 0 for an update that was undone.

        Raises:
            DivergedError: If too many updates in a row were undone.
        """
        assert self.optimizer is not None and self._before is not None
        finite = all_finite(self.network.parameters())
        fine = finite and kl <= self.largest_kl  # NaN is not
        if not fine:
            for parameter, value in zip(self.network.parameters(), self._before[0], strict=True):
                parameter.copy_(value)
            self.optimizer.load_state_dict(self._before[1])
            self.optimizer.slow_down()
        self._before = None
        moved = f"it moved the policy by {kl:.3g} nats per noise, more than {self.largest_kl:g}"
        self._count(None if fine else moved if math.isfinite(kl) else "its gradient or density is not finite")
        return kl if fine else 0.0

    def step(self, *batch: Any, **options: Any) -> float:
        """One step of the optimiser as a whole update, undone if it blew up; as :meth:`PolicyOptimizer.step`."""
        assert self.optimizer is not None
        self.remember()
        return self.settle(self.optimizer.step(*batch, **options))

    def check(self, held_out: float) -> None:
        """Refuses a network to be saved whose held-out loss is not finite.

        Raises:
            DivergedError: If it is not.
        """
        if not math.isfinite(held_out):
            raise DivergedError(f"training diverged: the loss on held-out data is {held_out}. {self._advice}")

    @property
    def record(self) -> dict[str, float]:
        """What is logged: updates skipped or undone so far."""
        return {"charts/skipped_updates": self.counters.skipped}

    @property
    def _advice(self) -> str:
        option = "target_kl" if self.optimizer is not None and self.optimizer.kind == "natural" else "learning_rate"
        return (
            f"Lower {option}, and look for extreme values in the data or the reward. The last checkpoint is of before: "
            "`--init-from` it in a new `--output-dir`"
        )

    def _count(self, cause: str | None) -> None:
        counters = self.counters
        if cause is None:
            counters.skipped_in_a_row = 0
            return
        counters.skipped, counters.skipped_in_a_row = counters.skipped + 1, counters.skipped_in_a_row + 1
        if counters.skipped_in_a_row >= IN_A_ROW:
            raise DivergedError(
                f"training diverged: {counters.skipped_in_a_row} updates in a row were skipped, the last one, "
                f"{counters.step + 1}, because {cause}. {self._advice}"
            )
        if counters.skipped_in_a_row == 1 and is_main():
            warnings.warn(f"update {counters.step + 1} was skipped: {cause}", stacklevel=3)


class CollapseWatch:
    """Warns, once each, of signs that a policy gives up variety or exploits its reward.

    Signs: the standard deviation of the noise halves; rewards do not differ within any prompt, :data:`IN_A_ROW` updates
    in a row; the reward rises while a scorer of weight 0, which is logged but not trained on, falls.

    Args:
        reward: What is trained on.
    """

    def __init__(self, reward: WeightedReward):
        self.held_out = [f"reward/{scorer.name}" for scorer, weight in reward.rewards if not weight]
        self.first_std: float | None = None
        self.without_spread = 0
        self.history: dict[str, list[float]] = {key: [] for key in ("charts/episodic_return", *self.held_out)}
        self.said: set[str] = set()

    def look(self, record: Mapping[str, float], advantages: torch.Tensor | None = None) -> None:
        """Looks at the record of an update.

        Args:
            record: What is logged.
            advantages: Of all episodes of the update, where there are any.
        """
        std = record["policy/std"]
        self.first_std = std if self.first_std is None else self.first_std
        if std < 0.5 * self.first_std:
            self._say(
                f"the standard deviation of the noise fell from {self.first_std:.2f} to {std:.2f}: images "
                "lose variety; try --policy.log-variance fixed, a larger kl_prior_coef or a smaller target_kl"
            )
        spread = advantages is None or bool(advantages.any())
        self.without_spread = 0 if spread else self.without_spread + 1
        if self.without_spread == IN_A_ROW:
            self._say(
                f"the rewards of a prompt did not differ in {IN_A_ROW} updates in a row, so nothing is learned; try "
                "more samples_per_prompt, harder prompts, or a reward that tells images apart"
            )
        for key, values in self.history.items():
            values.append(record.get(key, math.nan))
        for key in self.held_out:
            if _change(self.history["charts/episodic_return"]) > SURE and _change(self.history[key]) < -SURE:
                self._say(
                    f"the reward rises while {key.removeprefix('reward/')!r}, which is not trained on, falls: the "
                    "policy exploits its reward. Try a larger kl_prior_coef, or fewer updates"
                )

    def _say(self, text: str) -> None:
        kind = text[:20]
        if kind not in self.said and is_main():
            warnings.warn(text, stacklevel=4)
        self.said.add(kind)


def _change(values: list[float]) -> float:
    """How far the last values are above the first ones, in standard errors; 0 as long as there are too few."""
    if len(values) < 2 * WINDOW:
        return 0.0
    first, last = torch.tensor(values[:WINDOW]), torch.tensor(values[-WINDOW:])
    error = ((first.var() + last.var()) / WINDOW).sqrt()
    change = ((last.mean() - first.mean()) / error.clamp(min=1e-12)).item()
    return change if math.isfinite(change) else 0.0
