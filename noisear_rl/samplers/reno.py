"""ReNO: gradient ascent on the initial noise, through a one-step denoiser and a differentiable reward.

    maximise  R(denoise(x), text) - w · (½‖x‖² - (d - 1) log‖x‖)   over x,   starting at x ~ N(0, I)

The second term is, up to a constant, minus the log-density of the norm of Gaussian noise (a chi distribution with
``d`` degrees of freedom): it keeps ``‖x‖`` near ``√d``. Eyring et al. 2024, "ReNO: Enhancing one-step text-to-image
models through reward-based noise optimization" (arXiv 2406.04312).

Shapes: ``B`` samples, noise ``(B, C, h, w)`` of ``d`` elements each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from noisear_rl.denoisers import Conditioning, Denoiser, DifferentiableDenoiser, require
from noisear_rl.patches import per_row
from noisear_rl.rewards import WeightedReward
from noisear_rl.samplers.base import Incumbent, Sampler, Samples, check_choice


def norm_regularizer(noise: torch.Tensor) -> torch.Tensor:
    """``½‖x‖² - (d - 1) log‖x‖`` of each noise ``(B, …)``: ``(B,)``, minimal at ``‖x‖² = d - 1``."""
    norm = noise.flatten(1).norm(dim=1)
    return 0.5 * norm.square() - (noise[0].numel() - 1) * norm.log()


class Reno:
    """Follows the reward's gradient from a sampler's noise and keeps the noise with the best reward on the way.

    Gradient ascent with Nesterov momentum. The gradient of each sample is clipped separately, so samples do not
    influence each other, except that float rounding depends on the batch and accumulates; ``batch_size = 1`` rules
    this out.

    The defaults are the authors' for SD-Turbo, SDXL-Turbo and PixArt-α DMD (``learning_rate = 10`` for Hyper-SDXL)
    with the reward of ``configs/rewards/reno.yaml``: ``ImageReward + 5 · HPSv2.1 + 0.05 · PickScore + 0.01 · CLIP``,
    where CLIP is LAION's ViT-H/14 with its logit scale (:class:`~noisear_rl.rewards.clip.CLIPH`, about 100 times a
    cosine). They also suit ``shapes-turbo`` with ``shapes-match``, where 20 iterations at ``learning_rate = 10`` reach
    the same reward. A reward of another scale needs another ``regularization``.

    Every iteration is one forward pass, and the start's image is the first one, as in the authors' code: their 50
    iterations are 50 here. A start that only draws noise (by its ``draw``) is not denoised by itself, so that ``nfe``
    is ``iterations · denoiser.nfe``; a search adds its own. ``nfe`` does not include backward passes;
    :attr:`gradient_evaluations` is their number. A backward pass to the noise alone costs about as much as a forward
    pass, so count each as one more network evaluation when you compare methods at equal compute. It also runs through
    the decoder and the reward.

    The denoiser's scheduler must be deterministic. Memory grows with ``batch_size · num_inference_steps``.

    Args:
        start: Draws the first noise.
        denoiser: Frozen diffusion model, the one of ``start``, with one or a few steps.
        reward: The objective; every scorer must be differentiable. It should not be the judge.
        iterations: Images per result, including the start's.
        learning_rate: Step size.
        momentum: Nesterov momentum, in [0, 1).
        max_grad_norm: Each sample's gradient of reward and regularization together is clipped to this norm.
        regularization: ``w``, in reward per nat.
        batch_size: Samples optimised per batch.

    Raises:
        ValueError: If an argument is out of range, the reward is standardised by running statistics, or the denoiser
            has no gradients.
    """

    def __init__(
        self,
        start: Sampler,
        denoiser: Denoiser,
        reward: WeightedReward,
        *,
        iterations: int = 50,
        learning_rate: float = 5.0,
        momentum: float = 0.9,
        max_grad_norm: float = 0.1,
        regularization: float = 0.01,
        batch_size: int = 64,
    ):
        if iterations < 1 or batch_size < 1:
            raise ValueError(f"iterations and batch_size must be at least 1, got {iterations} and {batch_size}")
        if learning_rate <= 0 or max_grad_norm <= 0 or regularization < 0 or not 0 <= momentum < 1:
            raise ValueError(
                "expected learning_rate > 0, max_grad_norm > 0, regularization >= 0 and momentum in [0, 1), got "
                f"{learning_rate}, {max_grad_norm}, {regularization} and {momentum}"
            )
        check_choice(reward)
        self.denoiser = require(denoiser, DifferentiableDenoiser, "ReNO")
        self.start, self.reward = start, reward
        self.iterations, self.learning_rate, self.momentum = iterations, learning_rate, momentum
        self.max_grad_norm, self.regularization, self.batch_size = max_grad_norm, regularization, batch_size

    @property
    def gradient_evaluations(self) -> int:
        """Backward passes through the denoising network per image, without those of ``start``."""
        return (self.iterations - 1) * self.denoiser.nfe

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], *, denoising_seeds: Sequence[int] | None = None
    ) -> Samples:
        """See :class:`~noisear_rl.samplers.Sampler`; ``kl_to_gaussian`` is ``None``.

        Raises:
            ValueError: If a scorer has no gradient, or one that is not finite.
        """
        draw = getattr(self.start, "draw", None)
        if draw is not None:
            nfe, (noise, _) = 0.0, draw(prompts, seeds)
        else:
            first = self.start(prompts, seeds, denoising_seeds=denoising_seeds)
            nfe, noise = first.nfe, first.noise
        conditioning = self.denoiser.encode(prompts)
        climbed = []
        for begin in range(0, len(prompts), self.batch_size):
            rows = slice(begin, begin + self.batch_size)
            climbed.append(self._climb(noise[rows], conditioning[rows]))
        noise, images = (torch.cat(parts) for parts in zip(*climbed, strict=True))
        return Samples(noise, images, nfe + self.iterations * self.denoiser.nfe, None)

    def _climb(self, noise: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """The best noise on the way from ``noise``, and its image."""
        images, scores, gradient = self._look(noise, conditioning, backward=self.iterations > 1)
        best, velocity = Incumbent(noise, images, scores), torch.zeros_like(noise)
        for step in range(1, self.iterations):
            velocity = self.momentum * velocity + gradient
            noise = noise + self.learning_rate * (gradient + self.momentum * velocity)  # Nesterov, as torch.optim.SGD
            images, scores, gradient = self._look(noise, conditioning, backward=step + 1 < self.iterations)
            best.challenge(noise, images, scores)
        return best.noise, best.images

    def _look(
        self, noise: torch.Tensor, conditioning: Conditioning, *, backward: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, scores ``(B,)`` and each sample's clipped gradient ``(B, C, h, w)``, zero without ``backward``."""
        with torch.set_grad_enabled(backward):
            leaf = noise.clone().requires_grad_(backward)
            images = self.denoiser.denoise_differentiably(leaf, conditioning).clamp(0, 1)
            components = self.reward.components(images, conditioning.prompts)
            scores = self.reward.total(components)
            gradient = torch.zeros_like(noise)
            if backward:
                if blocked := [name for name, values in components.items() if not values.requires_grad]:
                    raise ValueError(
                        f"reward {blocked[0]!r} gives no gradient: expected a differentiable scorer; BestOf and "
                        "ZerothOrderSearch need none"
                    )
                objective = scores.sum() - self.regularization * norm_regularizer(leaf).sum()
                (gradient,) = torch.autograd.grad(objective, leaf)
        # A sample whose scorer failed stays where it is.
        gradient = torch.where(per_row(scores.isfinite(), gradient), gradient, 0.0)
        length = gradient.flatten(1).norm(dim=1)
        if not length.isfinite().all():
            raise ValueError("the reward's gradient holds NaN or infinite values: is every scorer differentiable?")
        gradient = gradient * per_row(self.max_grad_norm / length.clamp(min=self.max_grad_norm), gradient)
        return images.detach(), scores.detach(), gradient
