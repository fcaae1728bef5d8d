"""Denoisers: frozen diffusion models, and the interface that the rest of the library uses.

What a denoiser can do is in :mod:`~noisear_rl.denoisers.capabilities`; models of your own come in through
:mod:`~noisear_rl.denoisers.plugins`.

Shapes: ``B`` batch, ``L`` text tokens, ``D`` text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, PlainValidator

from noisear_rl import ENVIRONMENTS
from noisear_rl.denoisers.capabilities import (
    Denoiser,
    DifferentiableDenoiser,
    LatentDenoiser,
    NoisePredictor,
    require,
)
from noisear_rl.denoisers.plugins import find_plugin, load_plugin, plugin_names
from noisear_rl.patches import own_patch_size
from noisear_rl.wording import nearest

__all__ = [
    "EMBEDDED",
    "Conditioning",
    "Denoiser",
    "DenoiserName",
    "DenoiserOptions",
    "DifferentiableDenoiser",
    "LatentDenoiser",
    "NoisePredictor",
    "check_denoiser",
    "dtype_of",
    "embed_all",
    "load_denoiser",
    "policy_sizes",
    "require",
]

EMBEDDED = ("shapes", "shapes-turbo")  # need no download; their prompts are captions of the shapes world


def check_denoiser(name: str) -> str:
    """Returns the name of a denoiser that :func:`load_denoiser` knows, the folder of a pipeline, or ``module:Class``.

    Raises:
        ValueError: If it is none of them; names the nearest one.
        UntrustedCodeError: If a file that is not trusted names ``module:Class``.
    """
    known = sorted(ENVIRONMENTS.values())
    if name not in known and not Path(name).is_dir() and find_plugin(name) is None:
        known = sorted([*known, *plugin_names()])
        raise ValueError(
            f"unknown denoiser {name!r:.80}; expected one of {known}, a pipeline folder or module:Class"
            f"{nearest(name, known)}"
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
        inputs: Tensors ``(B, …)`` that the denoiser itself needs, by name: arguments of a pipeline's call.
    """

    prompts: list[str]
    policy_embeds: torch.Tensor
    policy_mask: torch.Tensor
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

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


def policy_sizes(denoiser: Denoiser, patch_size: int | Sequence[int] | None = None) -> dict[str, Any]:
    """The sizes that a policy must share with a denoiser, by field name of the policy's configuration.

    Args:
        denoiser: Any denoiser.
        patch_size: Patch size to include; ``None`` leaves it out, as samplers accept policies with any patch size.
    """
    sizes: dict[str, Any] = {"latent_shape": tuple(denoiser.latent_shape), "text_dim": denoiser.text_shape[1]}
    return sizes if patch_size is None else sizes | {"patch_size": own_patch_size(patch_size)}


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
            ``hunyuan-dit``, ``pixart-sigma``, ``sd3`` and those in ``noisear_rl/denoisers/README.md``; a folder with a
            pipeline of one of their classes; or ``module:Class`` or an entry point of group ``noisear_rl.denoisers``,
            which is called with the options as they are.
        **options: Overrides for the preset: ``path`` (another folder or Hub id), ``revision``, ``scheduler`` (``dpm``,
            ``euler`` or ``own``), ``unet`` (a safetensors file with other weights of the UNet), ``lora`` (a
            safetensors file, or ``OWNER/REPOSITORY/FILE`` on the Hub) and ``lora_scale``, ``height``, ``width``,
            ``num_frames``, ``max_sequence_length``, ``num_inference_steps``, ``guidance_scale``, ``patch_size``,
            ``device``, ``dtype``, ``micro_batch_size``, ``cache_dir``, ``embedding_dtype``, ``drop_text_encoders``,
            ``offload`` (``none``, ``model`` or ``sequential``), ``device_map`` (``balanced`` spreads the components
            over all accelerators),
            ``vae_slicing``, ``vae_tiling``, ``attention_slicing``, ``compile``; see
            :class:`~noisear_rl.denoisers.diffusion_pipeline.DiffusionPipelineDenoiser`. Strings are converted, so that
            they can come from a command line.

    Raises:
        ValueError: If the name or an option is unknown, or an option does not convert.
        FileNotFoundError: If the weights are not on this machine and cannot be downloaded.
    """
    if name not in ENVIRONMENTS.values() and not Path(name).is_dir() and (made := find_plugin(name)) is not None:
        return load_plugin(name, made, options)
    from noisear_rl.denoisers.presets import load_pipeline_denoiser

    return load_pipeline_denoiser(name, **options)
