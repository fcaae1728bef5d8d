"""Steps of a policy: natural-gradient steps of a given KL, whatever the parameterisation, or Adam's.

The Fisher matrix of a diagonal Gaussian policy is ``F = E[Jᵀ M J]`` with ``J`` the Jacobian of mean and log
standard deviation by the parameters and ``M = diag(1/σ², 2)``. Products ``F v`` cost three backward passes
through one forward pass (the double-backward trick), so ``F⁻¹ g`` by conjugate gradients needs no matrix
(Amari 1998; Schulman et al. 2015, TRPO, appendix C).

Several processes take the same step: each measures the metric and the KL on its part of the episodes, and the averages
over all of them decide.

Shapes: ``B`` episodes of this process, ``N`` patches, ``A`` elements per patch, ``P`` parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.distributions import Independent, kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from noisear_rl.distributed import Part, all_sum, among, shard
from noisear_rl.gaussian import rows_of
from noisear_rl.learning.guards import finite_gradients
from noisear_rl.policy import NoiseARPolicy

Optimizer = Literal["natural", "adam", "adaptive_adam"]
KL_TOLERANCE, MAX_HALVINGS = 1.5, 8  # a natural step longer than 1.5 times its target is halved, up to 8 times
ADAPT_BEYOND, ADAPT_FACTOR, ADAPT_RANGE = 2.0, 1.5, (1e-7, 1e-1)  # adaptive Adam: when, by how much, within which rates


def conjugate_gradient(
    product: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor, iterations: int, tolerance: float = 1e-6
) -> torch.Tensor:
    """Solves ``product(x) = target`` for a positive definite product; ``(P,)``. ``target`` becomes the residual."""
    x, residual = torch.zeros_like(target), target  # four vectors with the product: memory that counts
    direction, squared = residual.clone(), residual @ residual
    start = squared.clone()
    for _ in range(iterations):
        if squared <= tolerance * start:
            break
        curved = product(direction)
        step = squared / (direction @ curved)
        x.addcmul_(direction, step)
        residual.addcmul_(curved, step, value=-1)
        previous, squared = squared, residual @ residual
        direction.mul_(squared / previous).add_(residual)
    return x


def _split(vector: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Views of a vector ``(P,)`` in the parameters' shapes."""
    return [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)]


def twice_differentiable(
    policy: NoiseARPolicy, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None
) -> Independent:
    """The policy's distribution with a second derivative, which fused attention and compiled networks lack."""
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        return policy.distribution(patches, text, text_mask)


@dataclass
class _Jacobian:
    """The Jacobian of mean and log standard deviation, as a graph that can be differentiated again.

    Attributes:
        parameters: The policy's.
        outputs: Mean, and log standard deviation if it is not fixed, ``(B, N, A)`` each.
        metric: ``M``, one tensor per output.
        dummy: Inputs that ``transposed`` is linear in, one per output.
        transposed: ``Jᵀ dummy`` by parameter.
    """

    parameters: list[torch.nn.Parameter]
    outputs: list[torch.Tensor]
    metric: list[torch.Tensor]
    dummy: list[torch.Tensor]
    transposed: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, policy: NoiseARPolicy, distribution: Independent) -> _Jacobian:
        """Builds the graph from a distribution, as :func:`twice_differentiable` computes it."""
        parameters, std = [p for p in policy.parameters() if p.requires_grad], distribution.base_dist.stddev
        outputs, metric = [distribution.base_dist.mean], [std.detach() ** -2]
        if std.requires_grad:
            outputs.append(std.log())
            metric.append(torch.full_like(std, 2.0).detach())
        dummy = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        transposed = torch.autograd.grad(outputs, parameters, dummy, create_graph=True, materialize_grads=True)
        return cls(parameters, outputs, metric, dummy, transposed)

    def add_product(self, total: torch.Tensor, vector: torch.Tensor, weight: float) -> None:
        """Adds ``weight · F v`` of these episodes to ``total (P,)``."""
        forward = torch.autograd.grad(self.transposed, self.dummy, _split(vector, self.parameters), retain_graph=True)
        weighted = [m * u / len(m) for m, u in zip(self.metric, forward, strict=True)]  # M J v, per episode
        back = torch.autograd.grad(self.outputs, self.parameters, weighted, retain_graph=True, materialize_grads=True)
        for part, gradient in zip(_split(total, self.parameters), back, strict=True):
            part.add_(gradient, alpha=weight)


def fisher_product(
    policy: NoiseARPolicy,
    patches: torch.Tensor,
    text: torch.Tensor,
    text_mask: torch.Tensor | None,
    damping: float,
    weight: float = 1.0,
    micro_batches: int = 1,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Builds ``v → (F + damping·I) v`` on ``(P,)``, averaged over the episodes of all processes.

    ``½ vᵀ F v`` is the KL in nats per noise that a small parameter change ``v`` causes.

    Args:
        policy: The policy.
        patches: ``(B, N, A)``.
        text: ``(B, L, D)``.
        text_mask: ``(B, L)`` or ``None``.
        damping: Added to the diagonal.
        weight: Share of these episodes in those of all processes.
        micro_batches: Parts of the episodes. A single part keeps its graph between products; of several, each product
            builds them anew, one after the other: the memory of one part, about 1.6 times the time.
    """
    rows = torch.arange(len(patches), device=patches.device).chunk(micro_batches)

    def jacobian(part: torch.Tensor) -> _Jacobian:
        mask = None if text_mask is None else text_mask[part]
        return _Jacobian.of(policy, twice_differentiable(policy, patches[part], text[part], mask))

    kept = jacobian(rows[0]) if len(rows) == 1 else None

    def product(vector: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(vector)
        for part in rows:
            (kept or jacobian(part)).add_product(total, vector, weight * len(part) / len(patches))
        return all_sum(total).add_(vector, alpha=damping)

    return product


def assign_parameters(parameters: list[torch.nn.Parameter], vector: torch.Tensor) -> None:
    """Copies a vector ``(P,)`` into parameters; torch's own function would make them views of it."""
    for parameter, values in zip(parameters, _split(vector, parameters), strict=True):
        parameter.copy_(values)


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
    step = direction.mul_((2 * target_kl / (direction @ product(direction))).sqrt())
    del gradient, product
    if not step.isfinite().all():
        return math.nan, before
    with torch.no_grad():
        start = parameters_to_vector(parameters)
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
