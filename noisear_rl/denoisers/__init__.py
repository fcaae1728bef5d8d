"""Denoisers: frozen text-to-image diffusion models, and the interface that the rest of the library uses.

Shapes: ``B`` batch, ``L`` text tokens, ``D`` text width, noise ``(B, C, h, w)``, images ``(B, 3, H, W)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import torch
from pydantic import AfterValidator, PlainValidator

from noisear_rl import ENVIRONMENTS
from noisear_rl.config import nearest

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

__all__ = [
    "EMBEDDED",
    "Conditioning",
    "Denoiser",
    "DenoiserName",
    "DenoiserOptions",
    "check_denoiser",
    "dtype_of",
    "embed_all",
    "load_denoiser",
    "policy_sizes",
]

EMBEDDED = ("shapes", "shapes-turbo")  # need no download; their prompts are captions of the shapes world


def check_denoiser(name: str) -> str:
    """Returns the name of a denoiser that :func:`load_denoiser` knows, or the folder of a pipeline.

    Raises:
        ValueError: If it is neither; names the nearest one.
    """
    known = sorted(ENVIRONMENTS.values())
    if name not in known and not Path(name).is_dir():
        raise ValueError(
            f"unknown denoiser {name!r:.80}; expected one of {known} or a pipeline folder{nearest(name, known)}"
        )
    return name


def _check_options(options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"expected options by name, such as dtype: float32, not {options!r:.80}")
    for name, value in options.items():
        if value is None or isinstance(value, list | tuple | Mapping):
            raise ValueError(f"option {name} must be one text or number, not {value!r:.80}")
    return dict(options)


DenoiserName = Annotated[str, AfterValidator(check_denoiser)]
"""A configuration's denoiser."""
DenoiserOptions = Annotated[dict[str, str], PlainValidator(_check_options)]
"""A configuration's overrides for it; values other than text are taken too."""


@dataclass
class Conditioning:
    """Everything a denoiser derives from prompts, sliced and moved as one object.

    Attributes:
        prompts: ``B`` texts.
        policy_embeds: ``(B, L, D)`` float32; what the policy sees.
        policy_mask: ``(B, L)`` bool; true where a token is not padding.
        inputs: Tensors ``(B, …)`` by argument name of the pipeline's call.
    """

    prompts: list[str]
    policy_embeds: torch.Tensor
    policy_mask: torch.Tensor
    inputs: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: slice | Sequence[int]) -> Conditioning:
        rows = range(len(self))[index] if isinstance(index, slice) else list(index)
        at = torch.as_tensor(list(rows), dtype=torch.long, device=self.policy_embeds.device)
        return Conditioning(
            [self.prompts[i] for i in rows],
            self.policy_embeds[at],
            self.policy_mask[at],
            {key: value[at] for key, value in self.inputs.items()},
        )

    def to(self, device: torch.device | str) -> Conditioning:
        """Moves every tensor."""
        inputs = {key: value.to(device) for key, value in self.inputs.items()}
        return Conditioning(self.prompts, self.policy_embeds.to(device), self.policy_mask.to(device), inputs)

    @classmethod
    def concatenate(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenates along the batch."""
        return cls(
            [prompt for part in parts for prompt in part.prompts],
            torch.cat([part.policy_embeds for part in parts]),
            torch.cat([part.policy_mask for part in parts]),
            {key: torch.cat([part.inputs[key] for part in parts]) for key in parts[0].inputs},
        )


@runtime_checkable
class Denoiser(Protocol):
    """A frozen text-to-image diffusion model.

    ``gym.make(id, denoiser=...)`` copies its arguments deeply. A class that is large, or cannot be copied, defines
    ``__deepcopy__`` to return ``self``, as the library's own does.

    Attributes:
        name: Name in :func:`load_denoiser` and in records.
        revision: Revision of its weights, for records.
        latent_shape: ``(C, h, w)`` of its initial noise.
        image_size: Height and width of its images in pixels.
        text_shape: ``(L, D)`` of ``policy_embeds``.
        patch_size: Patch side that splits its noise into the paper's 16 patches.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance scale; 1 means no guidance.
    """

    name: str
    revision: str
    latent_shape: tuple[int, int, int]
    image_size: int
    text_shape: tuple[int, int]
    patch_size: int
    num_inference_steps: int
    guidance_scale: float

    @property
    def nfe(self) -> int:
        """Network evaluations per image (guidance counts twice)."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeds prompts; each distinct prompt is computed once."""
        ...

    def denoise(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Turns unit-variance noise ``(B, C, h, w)`` into images ``(B, 3, H, W)`` in [0, 1], float32."""
        ...

    def denoise_with_latents(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like :meth:`denoise`, but also returns the clean latents ``(B, C, h, w)`` of the images."""
        ...

    @property
    def signal_level(self) -> float:
        """``√ᾱ`` at the first timestep, in (0, 1)."""
        ...

    def denoise_differentiably(self, noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Like :meth:`denoise`, but differentiable with respect to the noise and not clamped to [0, 1]."""
        ...

    def predict_noise(
        self, latents: torch.Tensor, timestep: float, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        """Guided prediction of ε (or of a flow-matching model's velocity) at one timestep: ``(B, C, h, w)``."""
        ...

    def first_order_schedule(self, num_inference_steps: int) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
        """A deterministic first-order scheduler on the model's own noise schedule, with its timesteps set."""
        ...


def policy_sizes(denoiser: Denoiser, patch_size: int | None = None) -> dict[str, Any]:
    """The sizes that a policy must share with a denoiser, by field name of the policy's configuration.

    Args:
        denoiser: Any denoiser.
        patch_size: Patch side to include; ``None`` leaves it out, as samplers accept policies with any patch size.
    """
    sizes: dict[str, Any] = {"latent_shape": tuple(denoiser.latent_shape), "text_dim": denoiser.text_shape[1]}
    return sizes if patch_size is None else sizes | {"patch_size": patch_size}


def dtype_of(denoiser: Denoiser) -> str:
    """The precision that a denoiser runs in, for records: its images depend on it."""
    return str(getattr(denoiser, "dtype", "unknown")).removeprefix("torch.")


def embed_all(denoiser: Denoiser, prompts: Sequence[str]) -> None:
    """Embeds all prompts of a run and frees the text encoders, where ``drop_text_encoders`` asks for it."""
    if embed := getattr(denoiser, "embed_all", None):
        embed(prompts)


def load_denoiser(name: str, **options: Any) -> Denoiser:
    """Loads a denoiser by name.

    Args:
        name: ``shapes`` and its one-step student ``shapes-turbo`` (embedded), ``sdxl``, ``dreamshaper``,
            ``hunyuan-dit``, ``pixart-sigma``, ``sd3``, or a folder with a pipeline of one of these classes.
        **options: Overrides for the preset: ``path`` (another folder or Hub id), ``revision``, ``scheduler`` (``dpm``
            or ``own``), ``num_inference_steps``, ``guidance_scale``, ``patch_size``, ``device``, ``dtype``,
            ``micro_batch_size``, ``cache_dir``, ``embedding_dtype``, ``drop_text_encoders``, ``offload`` (``none``,
            ``model`` or ``sequential``), ``device_map`` (``balanced`` spreads the components over all accelerators),
            ``vae_slicing``, ``vae_tiling``, ``attention_slicing``, ``compile``; see
            :class:`~noisear_rl.denoisers.diffusion_pipeline.DiffusionPipelineDenoiser`. Strings are converted, so that
            they can come from a command line.

    Raises:
        ValueError: If the name or an option is unknown, or an option does not convert.
        FileNotFoundError: If the weights are not on this machine and cannot be downloaded.
    """
    from noisear_rl.denoisers.presets import load_pipeline_denoiser

    return load_pipeline_denoiser(name, **options)
