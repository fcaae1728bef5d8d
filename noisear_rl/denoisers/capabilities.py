"""What a denoiser can do: the protocol that every one has, and three more that some features ask for.

| protocol | who asks for it |
|---|---|
| :class:`Denoiser` | environments, samplers and the algorithms that learn from rewards alone |
| :class:`NoisePredictor` | weak-to-strong pairs |
| :class:`DifferentiableDenoiser` | ReNO and reward gradients |
| :class:`LatentDenoiser` | pairs and shared noises made of leaks |

Shapes: ``B`` batch, ``L`` text tokens, ``D`` text width, noise ``(B, C, *spatial)``: ``(B, C, h, w)`` of images,
``(B, C, t, h, w)`` of videos, ``(B, C, n)`` of signals; images ``(B, 3, H, W)``, or ``(B, T, 3, H, W)`` of videos.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    from noisear_rl.denoisers import Conditioning


@runtime_checkable
class Denoiser(Protocol):
    """A frozen model that turns noise and prompts into images.

    A class may inherit from this one, for the defaults, or have the same members. ``gym.make(id, denoiser=...)`` copies
    its arguments deeply; a class that is large, or cannot be copied, defines ``__deepcopy__`` to return ``self``, as
    the library's own does.

    Attributes:
        name: Name in :func:`~noisear_rl.denoisers.load_denoiser` and in records.
        latent_shape: ``(C, *spatial)`` of its initial noise.
        text_shape: ``(L, D)`` of ``policy_embeds``.
        patch_size: Patch side along every spatial axis, or one side per axis; what splits the noise into about 16
            patches is the paper's choice.
        image_size: Side of its square images in pixels, or height and width; noise is shown in this size.
        revision: Revision of its weights, for records.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance scale; 1 means no guidance.
    """

    name: str
    latent_shape: tuple[int, ...]
    text_shape: tuple[int, int]
    patch_size: int | tuple[int, ...]
    image_size: int | tuple[int, int] = 256
    revision: str = "unknown"
    num_inference_steps: int = 1
    guidance_scale: float = 1.0

    @property
    def nfe(self) -> int:
        """Network evaluations per image (guidance counts twice)."""
        return self.num_inference_steps * (2 if self.guidance_scale > 1 else 1)

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeds prompts; a prompt's embedding does not depend on the others."""
        ...

    @abstractmethod
    def denoise(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Turns unit-variance noise ``(B, C, *spatial)`` into images ``(B, 3, H, W)`` in [0, 1], float32.

        An image depends on its own noise, prompt and seed only. The noise is not modified.
        """
        ...


@runtime_checkable
class NoisePredictor(Denoiser, Protocol):
    """A denoiser whose single predictions can be asked for."""

    @abstractmethod
    def predict_noise(
        self, latents: torch.Tensor, timestep: float, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        """Guided prediction of ε (or of a flow-matching model's velocity) at one timestep: ``(B, C, *spatial)``."""
        ...

    @abstractmethod
    def first_order_schedule(self, num_inference_steps: int) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
        """A deterministic first-order scheduler on the model's own noise schedule, with its timesteps set."""
        ...


@runtime_checkable
class DifferentiableDenoiser(Denoiser, Protocol):
    """A denoiser with gradients."""

    @abstractmethod
    def denoise_differentiably(self, noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Like :meth:`denoise`, but differentiable with respect to the noise and not clamped to [0, 1]."""
        ...


@runtime_checkable
class LatentDenoiser(Denoiser, Protocol):
    """A denoiser that shows the latents of its images."""

    @abstractmethod
    def denoise_with_latents(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like :meth:`denoise`, but also returns the clean latents ``(B, C, *spatial)`` of the images."""
        ...

    @property
    @abstractmethod
    def signal_level(self) -> float:
        """``√ᾱ`` at the first timestep, in [0, 1); 0 if the schedule starts from pure noise."""
        ...


def require(denoiser: Any, capability: Any, feature: str) -> Any:
    """Returns the denoiser if it has what a feature needs.

    Args:
        denoiser: Any denoiser.
        capability: One of the protocols above.
        feature: Who asks, for the message.

    Raises:
        ValueError: If the denoiser lacks a member of the protocol; names the members.
    """
    members = {
        name
        for base in capability.__mro__
        if getattr(base, "_is_protocol", False)
        for name in (*vars(base), *vars(base).get("__annotations__", {}))
        if not name.startswith("_")
    }
    missing = sorted(name for name in members if not hasattr(denoiser, name))
    if missing:
        given = getattr(denoiser, "name", type(denoiser).__name__)
        raise ValueError(
            f"{feature} needs a denoiser with {', '.join(missing)} "
            f"(noisear_rl.denoisers.{capability.__name__}), and {given!r} has none"
        )
    return denoiser
