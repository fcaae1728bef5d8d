"""The Gaussian prior: seeded draws, and the distance from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.distributions import Independent, Normal


def kl_to_gaussian(distribution: Independent) -> torch.Tensor:
    """Closed-form KL to N(0, I) in nats, over the event: batch shape of the distribution."""
    mean, std = distribution.base_dist.mean, distribution.base_dist.stddev
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum(-1)


def gaussian_log_prob(patches: torch.Tensor) -> torch.Tensor:
    """Log-density of patches ``(…, A)`` under N(0, I), in nats, summed over their elements: ``(…)``."""
    return -0.5 * (patches.square() + math.log(2 * math.pi)).sum(-1)


def rows_of(distribution: Independent, rows: torch.Tensor | np.ndarray) -> Independent:
    """Some episodes of a distribution with batch shape ``(B, N)``."""
    gaussian = distribution.base_dist
    return Independent(Normal(gaussian.mean[rows], gaussian.stddev[rows], validate_args=False), 1, validate_args=False)


def concatenated(distributions: Sequence[Independent]) -> Independent:
    """One distribution of batch shape ``(B, N)`` from parts of its episodes, without gradients."""
    means, stds = ([getattr(d.base_dist, name).detach() for d in distributions] for name in ("mean", "stddev"))
    return Independent(Normal(torch.cat(means), torch.cat(stds), validate_args=False), 1, validate_args=False)


def standard_noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """N(0, I) of ``(len(seeds), *shape)`` in which each row depends only on its own seed."""
    generator = torch.Generator()
    rows = [torch.randn(*shape, generator=generator.manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, *shape)
