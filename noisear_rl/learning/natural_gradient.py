"""Steps of a policy: natural-gradient steps of a given KL, whatever the parameterisation, or Adam's.

A natural step moves along ``-F⁻¹ g``, with the Fisher matrix ``F`` of :mod:`noisear_rl.learning.fisher`. Several
processes take the same step: each measures the metric and the KL on its part of the episodes, and the averages over all
of them decide.

Shapes: ``B`` episodes of this process, ``N`` patches, ``A`` elements per patch, ``P`` parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.distributions import Independent, kl_divergence
from torch.nn.utils import parameters_to_vector

from noisear_rl.distributed import Part, all_sum, among, shard
from noisear_rl.gaussian import rows_of
from noisear_rl.learning.fisher import assign_parameters, conjugate_gradient, fisher_product
from noisear_rl.learning.guards import finite_gradients
from noisear_rl.policy import NoiseARPolicy

Optimizer = Literal["natural", "adam", "adaptive_adam"]
KL_TOLERANCE, MAX_HALVINGS = 1.5, 8  # a natural step longer than 1.5 times its target is halved, up to 8 times
ADAPT_BEYOND, ADAPT_FACTOR, ADAPT_RANGE = 2.0, 1.5, (1e-7, 1e-1)  # adaptive Adam: when, by how much, within which rates


def _some_rows(total: int, count: int) -> np.ndarray:
    """A fixed random choice of rows; rows at regular intervals would miss prompts, which alternate in a batch."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].numpy()


def _kl(before: Independent, after: Independent, weight: float) -> float:
    """``KL(before ‖ after)`` in nats per noise, averaged over the episodes of all processes."""
    return all_sum(kl_divergence(before, after).sum(1).mean() * weight).item()


def natural_step(
    policy: NoiseARPolicy,
    patches: torch.Tensor,
    text: torch.Tensor,
    text_mask: torch.Tensor | None,
    *,
    target_kl: float,
    damping: float = 0.01,
    iterations: int = 8,
    weight: float = 1.0,
    micro_batches: int = 1,
    loss: Callable[[], float] | None = None,
) -> tuple[float, Independent]:
    """Moves the policy along ``-F⁻¹ g``, scaled to ``target_kl``; ``g`` is what ``.grad`` holds, the same everywhere.

    Args:
        policy: Its gradients are read and released, and its parameters changed.
        patches: ``(B, N, A)`` sampled from the policy; the metric is measured on them.
        text: ``(B, L, D)``.
        text_mask: ``(B, L)`` or ``None``.
        target_kl: Size of the step in nats per noise, ``KL(old ‖ new)``.
        damping: Added to the Fisher matrix's diagonal.
        iterations: Conjugate-gradient iterations.
        weight: Share of these episodes in those of all processes.
        micro_batches: Parts that Fisher products are computed in; see :func:`fisher_product`.
        loss: Measures a loss whose minimum is to be reached, and whose curvature there is ``F``, such as trajectory
            balance. The step is ``-F⁻¹ g`` then, not lengthened to ``target_kl``, and shortened to the minimum along it
            where the curvature on these episodes is larger.

    Returns:
        The KL of the step as measured after it, at most ``1.5 · target_kl`` (the step is halved until it is), and the
        new distribution on these episodes. NaN if the direction is not finite; the policy has not moved then.

    Raises:
        ValueError: If the gradient is not finite.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    if not gradient.isfinite().all():
        raise ValueError("the gradient holds NaN or infinite values")
    policy.zero_grad(set_to_none=True)
    before = policy.exact_distribution(patches, text, text_mask)
    if not gradient.any():
        return 0.0, before
    product = fisher_product(policy, patches, text, text_mask, damping, weight, micro_batches)
    direction = conjugate_gradient(product, gradient, iterations)
    squared = direction @ product(direction)  # that is, gᵀd: the residual of conjugate gradients is orthogonal to d
    scale = (2 * target_kl / squared).sqrt()
    scale = scale if loss is None else scale.clamp(max=1.0)
    step, slope = direction.mul_(scale), (squared * scale).item()
    del gradient, product
    if not step.isfinite().all():
        return math.nan, before
    with torch.no_grad():
        start = parameters_to_vector(parameters)
        if loss is not None:
            before_it = loss()
            assign_parameters(parameters, start - step)
            curvature = 2 * (loss() - before_it + slope)
            step = step * (slope / curvature if curvature > slope else 1.0)
        for _ in range(MAX_HALVINGS):
            assign_parameters(parameters, start - step)
            after = policy.exact_distribution(patches, text, text_mask)
            kl = _kl(before, after, weight)
            if kl <= KL_TOLERANCE * target_kl:
                return kl, after
            step = step / 2
        assign_parameters(parameters, start)
    return 0.0, before


class PolicyOptimizer:
    """Takes a step along what ``.grad`` holds, and measures how far it went.

    Args:
        policy: The policy to change.
        kind: ``natural`` (:func:`natural_step` of ``target_kl``), ``adam`` (at ``learning_rate``) or
            ``adaptive_adam`` (Adam whose learning rate follows ``target_kl``: it grows by 1.5 while steps are shorter
            than half of it and shrinks by 1.5 while they are longer than twice).
        target_kl: Size of a step in nats per noise.
        learning_rate: Adam's, at the start.
        damping: Added to the Fisher matrix's diagonal.
        cg_iterations: Conjugate-gradient iterations per natural step.
        fisher_episodes: Episodes that the metric and the KL are measured on.
        micro_batches: Parts that Fisher products are computed in.
        max_grad_norm: Adam's gradients are clipped to this norm.

    Raises:
        ValueError: If the kind is unknown.
    """

    def __init__(
        self,
        policy: NoiseARPolicy,
        kind: Optimizer = "natural",
        *,
        target_kl: float = 1.0,
        learning_rate: float = 2e-4,
        damping: float = 0.01,
        cg_iterations: int = 8,
        fisher_episodes: int = 128,
        micro_batches: int = 1,
        max_grad_norm: float = 1.0,
    ):
        if kind not in get_args(Optimizer):
            raise ValueError(f"unknown optimizer {kind!r}; expected one of {get_args(Optimizer)}")
        self.policy, self.kind, self.target_kl, self.max_grad_norm = policy, kind, target_kl, max_grad_norm
        self.damping, self.cg_iterations, self.fisher_episodes = damping, cg_iterations, fisher_episodes
        self.micro_batches = micro_batches
        self.adam = torch.optim.Adam(policy.parameters(), lr=learning_rate, fused=True)

    @property
    def learning_rate(self) -> float:
        """Adam's learning rate, as adapted so far; the natural step has none."""
        return self.adam.param_groups[0]["lr"]

    def _set_learning_rate(self, rate: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = rate

    def step(
        self,
        patches: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor | None,
        old: Independent | None = None,
        share: float = 1.0,
        part: Part | None = None,
        loss: Callable[[], float] | None = None,
    ) -> float:
        """Moves the policy, the same way in every process.

        Args:
            patches: ``(B, N, A)``.
            text: ``(B, L, D)``.
            text_mask: ``(B, L)`` or ``None``.
            old: The distribution of these episodes to measure the KL from, such as that of the policy that sampled
                them, in float32; ``None`` for the policy before this step.
            share: Of ``target_kl`` to move by. Adam's learning rate is multiplied by its square root: KL grows with the
                squared rate.
            part: Which of the episodes of all processes these are; ``None`` for all of them, in a single process.
            loss: Measures the loss over all processes, for natural steps towards its minimum; see :func:`natural_step`.

        Returns:
            ``KL(old ‖ new)`` in nats per noise, measured on ``fisher_episodes`` of the episodes of all processes; NaN
            if the gradient is not finite (the policy has not moved then) or the new density is not.
        """
        if not finite_gradients(self.policy):
            return math.nan
        part = part or shard(len(patches))
        measured = among(_some_rows(part.total, self.fisher_episodes), part.places)
        rows, weight = measured.rows, measured.weight
        patches, text = patches[rows], text[rows]
        text_mask = None if text_mask is None else text_mask[rows]
        if self.kind == "natural":
            kl, after = natural_step(
                self.policy,
                patches,
                text,
                text_mask,
                target_kl=share * self.target_kl,
                damping=self.damping,
                iterations=self.cg_iterations,
                weight=weight,
                micro_batches=self.micro_batches,
                loss=loss,
            )
            return kl if old is None else _kl(rows_of(old, rows), after, weight)
        before = rows_of(old, rows) if old is not None else self.policy.exact_distribution(patches, text, text_mask)
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        rate, target_kl = self.learning_rate, share * self.target_kl
        self._set_learning_rate(rate * share**0.5)
        self.adam.step()
        with torch.no_grad():
            kl = _kl(before, self.policy.exact_distribution(patches, text, text_mask), weight)
        if self.kind == "adaptive_adam":
            low, high = target_kl / ADAPT_BEYOND, target_kl * ADAPT_BEYOND
            rate *= ADAPT_FACTOR if kl < low else 1 / ADAPT_FACTOR if kl > high else 1.0
            rate = min(max(rate, ADAPT_RANGE[0]), ADAPT_RANGE[1])
        self._set_learning_rate(rate)
        return kl

    def slow_down(self) -> None:
        """Lowers the rate of ``adaptive_adam`` after a step that was undone."""
        if self.kind == "adaptive_adam":
            self._set_learning_rate(max(self.learning_rate / ADAPT_FACTOR, ADAPT_RANGE[0]))

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments and learning rate."""
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.adam.load_state_dict(state)
