"""Fisher products of a policy, and conjugate gradients: what natural-gradient steps are made of.

The Fisher matrix of a diagonal Gaussian policy is ``F = E[Jᵀ M J]`` with ``J`` the Jacobian of mean and log
standard deviation by the parameters and ``M = diag(1/σ², 2)``. Products ``F v`` cost three backward passes
through one forward pass (the double-backward trick), so ``F⁻¹ g`` by conjugate gradients needs no matrix
(Amari 1998; Schulman et al. 2015, TRPO, appendix C).

Shapes: ``B`` episodes of this process, ``N`` patches, ``A`` elements per patch, ``P`` parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributions import Independent
from torch.nn.attention import SDPBackend, sdpa_kernel

from noisear_rl.distributed import all_sum
from noisear_rl.policy import NoiseARPolicy


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
