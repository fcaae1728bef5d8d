"""The noise that strong guidance would have preferred: a step down with strong guidance, a step back up with weak.

Both predictions are made at the same timestep ``t0`` (NoiseAR §3.1; Bai et al. arXiv 2502.00473; Golden Noise arXiv
2411.09502).

Shapes: ``B`` pairs, noise ``(B, C, h, w)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from noisear_rl.denoisers import Conditioning, NoisePredictor
from noisear_rl.patches import per_row

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

InversionMode = Literal["exact", "compat"]


@dataclass(frozen=True)
class Inversion:
    """Coefficients of one step down and one back up: ``x1 = a·x0 + b·ε_s``, ``x0' = c·x1 + d·ε_w``."""

    timestep: float
    a: float
    b: float
    c: float
    d: float

    @property
    def k(self) -> float:
        """Strength of the shift: ``x0' = a·c·x0 + k·(ε_w - ε_s)`` where the inversion is exact."""
        return self.d


def inversion_coefficients(
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler, inversion: InversionMode = "exact"
) -> Inversion:
    """Coefficients at the first two timesteps of a schedule whose timesteps are set.

    Args:
        scheduler: Deterministic DDIM (``eta = 0``), or Euler for flow matching, where the prediction is a velocity:
            ``x1 = x0 + (σ1 - σ0)·v`` and back.
        inversion: ``exact``: the inverse of the step just taken. ``compat``: like public scripts that use
            ``DDIMInverseScheduler``, which inverts an interval of ``T // n`` below the second timestep (``T`` training
            steps, ``n`` steps), about the *next* step's, and so scales the noise (by 1.0035 on SDXL's schedule at 50
            steps).

    Raises:
        ValueError: If the inversion is unknown or there are too few timesteps.
    """
    if inversion not in get_args(InversionMode):
        raise ValueError(f"unknown inversion {inversion!r}; expected one of {get_args(InversionMode)}")
    from diffusers import FlowMatchEulerDiscreteScheduler  # here: it takes seconds to load

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if inversion != "exact":
            raise ValueError(f"{inversion!r} inversion exists only for DDIM; flow matching needs 'exact'")
        down = float(scheduler.sigmas[1] - scheduler.sigmas[0])
        return Inversion(float(scheduler.timesteps[0]), a=1.0, b=down, c=1.0, d=-down)
    needed, steps = 2 if inversion == "exact" else 3, len(scheduler.timesteps)
    if steps < needed:
        raise ValueError(f"{inversion!r} inversion needs at least {needed} timesteps")
    times = [int(t) for t in scheduler.timesteps[:2]]
    times.append(max(times[1] - scheduler.config.num_train_timesteps // steps, 0))
    alpha = [float(scheduler.alphas_cumprod[t]) for t in times]
    high, low = (alpha[0], alpha[1]) if inversion == "exact" else (alpha[1], alpha[2])
    a = (alpha[1] / alpha[0]) ** 0.5
    c = (high / low) ** 0.5
    return Inversion(
        timestep=times[0],
        a=a,
        b=(1 - alpha[1]) ** 0.5 - a * (1 - alpha[0]) ** 0.5,
        c=c,
        d=(1 - high) ** 0.5 - c * (1 - low) ** 0.5,
    )


def network_evaluations(strong_guidance: float = 5.5, weak_guidance: float = 1.0, rounds: int = 1) -> int:
    """Network evaluations per pair: guidance above 1 needs an unconditional prediction, too."""
    return rounds * sum(2 if guidance > 1 else 1 for guidance in (strong_guidance, weak_guidance))


def weak_to_strong(
    denoiser: NoisePredictor,
    noise: torch.Tensor,
    conditioning: Conditioning,
    *,
    strong_guidance: float = 5.5,
    weak_guidance: float = 1.0,
    num_inference_steps: int = 50,
    inversion: InversionMode = "exact",
    rounds: int = 1,
) -> torch.Tensor:
    """Computes the target noise of a pair, with two predictions per round (:func:`network_evaluations`).

    Args:
        denoiser: Any denoiser that predicts noise.
        noise: ``(B, C, h, w)`` from N(0, I). Not changed.
        conditioning: Of ``B`` prompts.
        strong_guidance: Guidance of the step down.
        weak_guidance: Guidance of the step up.
        num_inference_steps: Length of the DDIM schedule; fewer steps mean larger ones.
        inversion: See :func:`inversion_coefficients`.
        rounds: Number of repetitions, each from the last target.

    Returns:
        ``(B, C, h, w)`` float32 on the denoiser's device; NaN for a pair whose predictions were not finite.
    """
    step = inversion_coefficients(denoiser.first_order_schedule(num_inference_steps), inversion)
    target, whole = noise.float(), torch.ones(len(noise), dtype=torch.bool, device=noise.device)
    for _ in range(rounds):
        strong = denoiser.predict_noise(target, step.timestep, conditioning, strong_guidance)
        lower = step.a * target.to(strong.device) + step.b * strong
        whole, lower = _finite(whole, lower)
        weak = denoiser.predict_noise(lower, step.timestep, conditioning, weak_guidance)
        whole, target = _finite(whole, step.c * lower + step.d * weak)
    return torch.where(per_row(whole, target), target, torch.nan)


def _finite(whole: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are still finite, and the latents with 0 in the others: the denoiser refuses them."""
    whole = whole.to(latents.device) & latents.flatten(1).isfinite().all(1)
    return whole, torch.where(per_row(whole, latents), latents, 0.0)
