"""Steps of a policy: natural-gradient ones of a given KL, whatever the parameterisation, or Adam's.

The Fisher matrix of a diagonal Gaussian policy is ``F = E[Jᵀ M J]`` with ``J`` the Jacobian of mean and log
standard deviation by the parameters and ``M = diag(1/σ², 2)``. Products ``F v`` cost three backward passes
through one forward pass (the double-backward trick), so ``F⁻¹ g`` by conjugate gradients needs no matrix
(Amari 1998; Schulman et al. 2015, TRPO, appendix C).

Shapes: ``B`` episodes, ``N`` patches, ``A`` elements a patch, ``P`` parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from noisear_rl.policy import NoiseARPolicy

OPTIMIZERS = ("natural", "adam", "adaptive_adam")


def conjugate_gradient(
    product: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor, iterations: int, tolerance: float = 1e-6
) -> torch.Tensor:
    """Solves ``product(x) = target`` for a positive definite product; ``(P,)``."""
    x, residual = torch.zeros_like(target), target.clone()
    direction, squared = residual.clone(), residual @ residual
    start = squared.clone()
    for _ in range(iterations):
        if squared <= tolerance * start:
            break
        curved = product(direction)
        step = squared / (direction @ curved)
        x += step * direction
        residual -= step * curved
        previous, squared = squared, residual @ residual
        direction = residual + squared / previous * direction
    return x


def _split(vector: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Views of a vector ``(P,)`` in the parameters' shapes."""
    return [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)]


def fisher_product(
    policy: NoiseARPolicy, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None, damping: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Builds ``v → (F + damping·I) v`` on ``(P,)``, averaged over episodes ``(B, N, A)``.

    ``½ vᵀ F v`` is the KL in nats, a whole noise, that a small parameter change ``v`` causes.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        gaussian = policy.distribution(patches, text, text_mask).base_dist
    std = gaussian.stddev
    outputs, metric = [gaussian.mean], [std.detach() ** -2]
    if std.requires_grad:
        outputs.append(std.log())
        metric.append(torch.full_like(std, 2.0).detach())
    dummy = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    backward = torch.autograd.grad(outputs, parameters, dummy, create_graph=True, materialize_grads=True)

    def product(vector: torch.Tensor) -> torch.Tensor:
        parts = _split(vector, parameters)
        forward = torch.autograd.grad(backward, dummy, parts, retain_graph=True)  # J v
        weighted = [m * u / len(patches) for m, u in zip(metric, forward, strict=True)]
        back = torch.autograd.grad(outputs, parameters, weighted, retain_graph=True, materialize_grads=True)
        return torch.cat([b.reshape(-1) for b in back]) + damping * vector

    return product


def _assign(parameters: list[torch.nn.Parameter], vector: torch.Tensor) -> None:
    """Copies a vector ``(P,)`` into parameters; torch's own function would make them views of it."""
    for parameter, values in zip(parameters, _split(vector, parameters), strict=True):
        parameter.copy_(values)


def _some(count: int, *parts: Any) -> tuple:
    """A fixed random choice of rows: at regular intervals it would miss prompts that take turns in a batch."""
    rows = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(0))[:count]
    return tuple(None if part is None else part[rows] for part in parts)


def natural_step(
    policy: NoiseARPolicy,
    patches: torch.Tensor,
    text: torch.Tensor,
    text_mask: torch.Tensor | None,
    *,
    max_kl: float,
    damping: float = 0.01,
    iterations: int = 8,
    fisher_episodes: int = 128,
) -> float:
    """Moves the policy along ``-F⁻¹ g``, scaled to ``max_kl``; ``g`` is what ``.grad`` holds.

    Args:
        policy: Its gradients are read and its parameters changed.
        patches: ``(B, N, A)`` the policy has sampled; the metric is measured on them.
        text: ``(B, L, D)``.
        text_mask: ``(B, L)`` or ``None``.
        max_kl: Size of the step in nats a whole noise, ``KL(old ‖ new)``.
        damping: Added to the Fisher matrix's diagonal.
        iterations: Of conjugate gradients.
        fisher_episodes: Episodes that the metric is measured on, a random choice; fewer are cheaper.

    Returns:
        The KL of the step as measured after it, at most ``1.5 · max_kl`` (the step is halved until it is).
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    if not gradient.isfinite().all():
        raise ValueError("the gradient holds NaN or infinite values")
    if not gradient.any():
        return 0.0
    patches, text, text_mask = _some(fisher_episodes, patches, text, text_mask)
    product = fisher_product(policy, patches, text, text_mask, damping)
    direction = conjugate_gradient(product, gradient, iterations)
    step = direction * (2 * max_kl / (direction @ product(direction))).sqrt()
    with torch.no_grad():
        start = parameters_to_vector(parameters)
        before = policy.distribution(patches, text, text_mask)
        for _ in range(8):
            _assign(parameters, start - step)
            after = policy.distribution(patches, text, text_mask)
            kl = torch.distributions.kl_divergence(before, after).sum(1).mean().item()
            if kl <= 1.5 * max_kl:
                return kl
            step = step / 2
        _assign(parameters, start)
    return 0.0


class PolicyOptimizer:
    """Takes a step on what ``.grad`` holds, and measures how far it went.

    Args:
        policy: Whose parameters to change.
        kind: ``natural`` (:func:`natural_step` of ``target_kl``), ``adam`` (at ``learning_rate``) or
            ``adaptive_adam`` (Adam whose learning rate follows ``target_kl``: times 1.5 while a step is shorter
            than half of it, divided by 1.5 while it is longer than twice).
        target_kl: Nats a whole noise.
        learning_rate: Adam's, at the start.
        damping: Of the Fisher matrix.
        cg_iterations: Of conjugate gradients.
        fisher_episodes: Episodes that the metric and the KL are measured on.
        max_grad_norm: Adam's gradients are clipped to this norm.

    Raises:
        ValueError: If the kind is unknown.
    """

    def __init__(
        self,
        policy: NoiseARPolicy,
        kind: str = "natural",
        *,
        target_kl: float = 1.0,
        learning_rate: float = 2e-4,
        damping: float = 0.01,
        cg_iterations: int = 8,
        fisher_episodes: int = 128,
        max_grad_norm: float = 1.0,
    ):
        if kind not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {kind!r}; expected one of {OPTIMIZERS}")
        self.policy, self.kind, self.target_kl, self.max_grad_norm = policy, kind, target_kl, max_grad_norm
        self.damping, self.cg_iterations, self.fisher_episodes = damping, cg_iterations, fisher_episodes
        self.adam = torch.optim.Adam(policy.parameters(), lr=learning_rate)

    def step(self, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None) -> float:
        """Moves the policy; returns ``KL(old ‖ new)`` in nats a whole noise, measured on some of the episodes."""
        if self.kind == "natural":
            return natural_step(
                self.policy,
                patches,
                text,
                text_mask,
                max_kl=self.target_kl,
                damping=self.damping,
                iterations=self.cg_iterations,
                fisher_episodes=self.fisher_episodes,
            )
        patches, text, text_mask = _some(self.fisher_episodes, patches, text, text_mask)
        with torch.no_grad():
            before = self.policy.distribution(patches, text, text_mask)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        if not norm.isfinite():
            raise ValueError("the gradient holds NaN or infinite values")
        self.adam.step()
        with torch.no_grad():
            after = self.policy.distribution(patches, text, text_mask)
            kl = torch.distributions.kl_divergence(before, after).sum(1).mean().item()
        if self.kind == "adaptive_adam":
            factor = 1.5 if kl < self.target_kl / 2 else 1 / 1.5 if kl > self.target_kl * 2 else 1.0
            for group in self.adam.param_groups:
                group["lr"] = min(max(group["lr"] * factor, 1e-7), 1e-1)
        return kl

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments and learning rate."""
        return self.adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.adam.load_state_dict(state)
