"""How far an update may move a policy: steps grow with the evidence that rewards confirm them, and end without it.

Steps of a fixed KL never end: where rewards are pure noise, the policy walks at random. Here update ``u`` may spend

    KL_u = min(W_u · 0.05 nats / u, target_kl),    W_u = 0.9 · W_{u-1} · exp(z_u - ½) + 0.1,    W_1 = 1

where the *agreement* ``z_u`` is a t-statistic: do the rewards of fresh images rise on the way from the policy at the
start to the present one? Without a signal it has mean 0 and variance 1, so each factor has mean 1, and so has ``W`` (an
e-process with a fixed share: Ramdas et al. 2023, arXiv 2210.01948; Herbster & Warmuth 1998). The steps of pure noise
therefore add up to ``0.05 · (1 + ½ + … + 1/u)`` nats in expectation: 0.22 after 50 updates, 0.37 after 1,000. With a
signal ``W`` grows exponentially, up to 10 times what a step of ``target_kl`` needs; when the signal ends, it decays.

Shapes: ``B`` episodes, ``N`` patches, ``A`` elements per patch.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch.distributions import Independent, kl_divergence

from noisear_rl.distributed import all_sum

Step = Literal["adaptive", "fixed"]
FREE_KL = 0.05  # nats that the first update may spend without evidence; update u may spend a u-th of it
RESET = 0.1  # share of the evidence that is reset at each update, so that old evidence is forgotten
RESERVE = 10.0  # the most evidence, relative to what the largest step needs: a few updates without agreement do no harm
LARGEST_AGREEMENT = 50.0  # keeps exp() finite


def agreement(policy: Independent, start: Independent, patches: torch.Tensor, advantages: torch.Tensor) -> float | None:
    """Do rewards rise on the way from one policy to another, over the episodes of all processes?

    How much likelier an episode has become, minus what is expected of that, has mean 0 given the patches before. If
    rewards do not depend on it, neither does its product with the advantage.

    Args:
        policy: The policy that sampled, batch shape ``(B, N)``.
        start: The policy at the start, on the same episodes.
        patches: ``(B, N, A)`` sampled from ``policy``.
        advantages: ``(B,)`` or ``(B, N)``.

    Returns:
        The products' mean in standard errors, or ``None`` if all of them are 0: the policies or the rewards are equal.
    """
    surprise = policy.log_prob(patches) - start.log_prob(patches) - kl_divergence(policy, start)  # (B, N)
    gains = (surprise * advantages.reshape(len(patches), -1)).sum(1)  # (B,)
    total, squares, moved = all_sum(torch.stack([gains.sum(), gains.square().sum(), gains.any().float()]))
    return (total / squares.sqrt()).item() if moved else None


class StepSize:
    """The size of a policy's updates.

    Args:
        kind: ``adaptive`` (by the evidence, see the module's docstring) or ``fixed`` (always ``target_kl``).
        target_kl: The largest update in nats per noise.

    Attributes:
        evidence: ``W``, a likelihood ratio of signal against noise.
        updates: Updates so far.

    Raises:
        ValueError: If ``target_kl`` is not positive.
    """

    def __init__(self, kind: Step, target_kl: float):
        if not target_kl > 0:
            raise ValueError(f"target_kl must be positive, got {target_kl}")
        self.kind, self.target_kl = kind, target_kl
        self.evidence, self.updates = 1.0, 0

    def next(self, agreement: float | None) -> float:
        """The KL of the next update in nats per noise, at most ``target_kl``.

        Args:
            agreement: What :func:`agreement` says of fresh episodes.
        """
        self.updates += 1
        if self.kind == "fixed":
            return self.target_kl
        if agreement is not None:
            ratio = math.exp(min(agreement, LARGEST_AGREEMENT) - 0.5)
            self.evidence = (1 - RESET) * self.evidence * ratio + RESET
        free = FREE_KL / self.updates
        self.evidence = min(self.evidence, RESERVE * max(self.target_kl / free, 1.0))
        return min(self.evidence * free, self.target_kl)

    def state_dict(self) -> dict[str, Any]:
        """Evidence and number of updates."""
        return {"evidence": self.evidence, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.evidence, self.updates = state["evidence"], state["updates"]
