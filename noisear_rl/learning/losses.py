"""Losses and estimators as pure functions of tensors.

Shapes: ``B`` episodes, ``N`` patches, ``A`` elements per patch. Log-probabilities are per patch, summed over
its elements, in nats.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.distributions import Independent

Advantage = Literal["none", "ema", "rloo", "grpo"]
ROUNDING = 1e-6  # relative; what is smaller is no difference between rewards


def nll_loss(distribution: Independent, target: torch.Tensor, noise_scale: float | torch.Tensor = 0.0) -> torch.Tensor:
    """Negative log-likelihood of target patches, per element (NoiseAR §2.3).

    Args:
        distribution: Batch shape ``(B, N)``, event shape ``(A,)``.
        target: ``(B, N, A)``.
        noise_scale: Standard deviation of Gaussian noise on the targets, one number or one per patch ``(N, 1)``, over
            which the expectation is taken in closed form: ``E[-log p(target + noise_scale·ε)]``.

    Returns:
        A scalar: nats per element, so that its scale does not depend on the latent's size.
    """
    spread = 0.5 * (noise_scale / distribution.base_dist.stddev).square().sum(-1)
    return (spread - distribution.log_prob(target)).mean() / target.shape[-1]


def reconstruction_loss(distribution: Independent, target: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error between reparameterised samples and target patches (NoiseAR §2.3).

    Args:
        distribution: Batch shape ``(B, N)``, event shape ``(A,)``.
        target: ``(B, N, A)``.
        noise: Standard normal ``(B, N, A)`` for the reparameterisation.
    """
    sample = distribution.base_dist.mean + distribution.base_dist.stddev * noise
    return (sample - target).square().mean()


def finite_episodes(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Which episodes can be trained on: a scorer may give NaN for an image.

    Args:
        rewards: ``(B,)``, one per episode.
        groups: ``(B,)`` integers; episodes of one prompt share a number.

    Returns:
        Row numbers ``(b,)`` of the episodes with a finite reward. Where only one episode of a prompt is left of
        several, it is dropped too: there is nothing to compare it with.

    Raises:
        ValueError: If no episode is left.
    """
    finite = rewards.isfinite()
    if not finite.all():
        same = groups[:, None] == groups
        alone = ((same & finite).sum(1) < 2) & (same.sum(1) > 1)
        finite &= ~alone
    if not finite.any():
        raise ValueError("no episode of this update has a finite reward: which scorer gives NaN or infinity, and why?")
    return finite.nonzero()[:, 0]


def check_groups(kind: str, samples_per_prompt: int) -> None:
    """Refuses a baseline that a prompt's episodes are too few for.

    Raises:
        ValueError: If ``rloo`` or ``grpo`` would meet prompts with a single episode.
    """
    if kind in ("rloo", "grpo") and samples_per_prompt < 2:
        raise ValueError(
            f"advantage {kind!r} compares the episodes of a prompt: samples_per_prompt must be at least 2, not "
            f"{samples_per_prompt}; or choose another advantage"
        )


def group_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, kind: Advantage, ema: float | None = None
) -> torch.Tensor:
    """How much better an episode did than a baseline.

    Args:
        rewards: ``(B,)``, one per episode.
        groups: ``(B,)`` integers; episodes of one prompt share a number.
        kind: ``none``: the reward itself. ``ema``: minus a running mean of earlier rewards. ``rloo``: minus the mean
            of the prompt's other episodes (leave one out; unbiased; Kool et al. 2019, Ahmadian et al. 2024 arXiv
            2402.14740). ``grpo``: minus the mean of the prompt's episodes, divided by their standard deviation (Shao
            et al. 2024 arXiv 2402.03300); 0 where all are equal.
        ema: Running mean of rewards, for ``kind="ema"``.

    Returns:
        ``(B,)`` advantages, in units of reward except for ``grpo``.

    Raises:
        ValueError: If ``kind`` is unknown, or ``rloo`` or ``grpo`` meets a prompt with a single episode.
    """
    if kind not in get_args(Advantage):
        raise ValueError(f"unknown advantage {kind!r}; expected one of {get_args(Advantage)}")
    if kind == "none":
        return rewards.clone()
    if kind == "ema":
        return rewards - (0.0 if ema is None else ema)
    _, index = groups.unique(return_inverse=True)
    count = rewards.new_zeros(int(index.max()) + 1).index_add_(0, index, torch.ones_like(rewards))
    if (count < 2).any():
        raise ValueError(f"{kind} needs at least two episodes of every prompt")
    least = torch.zeros_like(count).scatter_reduce(0, index, rewards, "amin", include_self=False)
    rewards = rewards - least[index]  # exactly 0 where the rewards of a prompt are equal, so that no rounding is left
    total = torch.zeros_like(count).index_add_(0, index, rewards)
    if kind == "rloo":
        return rewards - (total[index] - rewards) / (count[index] - 1)
    centred = rewards - (total / count)[index]
    std = (torch.zeros_like(count).index_add_(0, index, centred.square()) / (count - 1)).sqrt()
    return centred / (std[index] + 1e-4)


def standardized(advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Advantages in units of their standard deviation, or zeros where the rewards do not differ.

    Equal rewards, of all episodes or of those of each prompt, leave rounding errors as advantages; dividing these by
    their own spread would make full-size steps of them.

    Args:
        advantages: ``(B,)`` or ``(B, N)``.
        rewards: ``(B,)``, from which they were computed.
    """
    rounding = ROUNDING * rewards.abs().max()
    differ = rewards.max() - rewards.min() > rounding and advantages.abs().max() > rounding
    if not differ or advantages.numel() < 2:
        return torch.zeros_like(advantages)
    return advantages / advantages.std()


def reinforce_loss(log_prob: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Score-function estimator ``-E[A · log π(x)]`` (Williams 1992), whose gradient is the policy gradient.

    Args:
        log_prob: ``(B, N)``.
        advantages: ``(B,)``, one per episode; no gradient flows into them.

    Returns:
        A scalar, averaged over episodes, summed over patches.

    Raises:
        ValueError: If there is not one advantage per episode (``(B, 1)`` would broadcast silently).
    """
    if advantages.shape != log_prob.shape[:1]:
        raise ValueError(f"expected advantages {tuple(log_prob.shape[:1])}, got {tuple(advantages.shape)}")
    return -(advantages.detach() * log_prob.sum(1)).mean()


def ppo_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    clip_range: float,
    clip_high: float | None = None,
) -> torch.Tensor:
    """Clipped surrogate of PPO (Schulman et al. 2017, equation 7); a patch is an action.

    At the first step the ratio is 1, and the gradient is :func:`reinforce_loss`'s. With ``grpo`` advantages it is the
    loss of GRPO (Shao et al. 2024, arXiv 2402.03300), times the number of patches; with ``clip_high`` above
    ``clip_range``, DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476).

    Args:
        log_prob: ``(B, N)`` under the policy being trained.
        old_log_prob: ``(B, N)`` under the policy that sampled; no gradient flows into it.
        advantages: ``(B, N)``; no gradient flows into them.
        clip_range: Ratios beyond ``1 ± clip_range`` gain nothing.
        clip_high: Instead of ``clip_range`` for ratios above 1; ``None`` for the same.

    Returns:
        A scalar, averaged over episodes, summed over patches.

    Raises:
        ValueError: If shapes differ.
    """
    if not log_prob.shape == old_log_prob.shape == advantages.shape:
        shapes = [tuple(x.shape) for x in (log_prob, old_log_prob, advantages)]
        raise ValueError(f"expected three tensors (B, N) of one shape, got {shapes}")
    advantages = advantages.detach()
    ratio = (log_prob - old_log_prob.detach()).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + (clip_range if clip_high is None else clip_high))
    return -torch.minimum(ratio * advantages, clipped * advantages).sum(1).mean()


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016) for a reward at the end alone and ``γ = 1``.

    Args:
        rewards: ``(B,)``, given after the last patch; nothing is bootstrapped beyond it.
        values: ``(B, N)``; column ``i`` is the value before patch ``i``.
        gae_lambda: 1 for ``R - V_i``, 0 for one-step differences.

    Returns:
        Advantages and returns (targets of the values), ``(B, N)`` each.
    """
    after = torch.cat([values[:, 1:], rewards[:, None]], 1)
    delta = after - values
    advantages, running = torch.zeros_like(values), torch.zeros_like(rewards)
    for i in reversed(range(values.shape[1])):
        running = delta[:, i] + gae_lambda * running
        advantages[:, i] = running
    return advantages, advantages + values
