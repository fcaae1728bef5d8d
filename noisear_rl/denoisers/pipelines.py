"""The differences between diffusers' text-to-image and text-to-video pipelines.

Everything else is the pipeline's own ``encode_prompt`` and ``__call__``. To support another class that accepts
``latents`` and prompt embeddings, add an entry to :data:`INTERFACES`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available

LARGEST_GUIDANCE = 1000.0  # beyond it images are noise, or NaN
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
_MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_SECOND = tuple(f"{name}_2" for name in (*_EMBEDS, *_MASKS))
UNUSED = ""  # name of a value of `encode_prompt` that `__call__` does not take
Packing = Literal["none", "2x2", "rows"]
Guidance = Literal["free", "embedded", "none"]


@dataclass(frozen=True)
class PipelineInterface:
    """How to call one class of pipelines.

    Attributes:
        network: Name of the denoising network: ``unet`` or ``transformer``.
        text_width: Key in the network's config for the width of ``prompt_embeds``.
        encodings: Calls of ``encode_prompt`` that compute the conditioning: keyword arguments, and the names of the
            returned values as arguments of ``__call__``, in order.
        tokens: Tokenizers whose tokens are concatenated in ``prompt_embeds``, with the length that each is padded to;
            ``None`` for the tokenizer's own.
        longest: Tokens of a prompt that ``encode_prompt`` takes as ``max_sequence_length``; ``None`` if it has none.
        options: Additional keyword arguments of ``__call__``.
        few_steps: More of them, which depend on the number of denoising steps.
        call_defaults: Arguments of ``encode_prompt`` that ``__call__`` has other defaults for, which are used.
        negative: Whether ``encode_prompt`` returns the negative embeddings ``together`` with those of the prompt, gives
            them for ``negative_prompt`` (``apart``), or the class has none.
        negative_prompt: The text without a prompt.
        mask: The tensor that says which tokens count; ``None`` where the tokenizers do. It is made of the lengths where
            embeddings come without padding.
        ragged: How embeddings without padding go back to ``__call__``: as a ``list`` of tensors, or cut to the
            ``longest`` prompt of the batch, with their mask.
        guidance: ``free`` (classifier-free, two evaluations of the network) or ``embedded`` (an input of the network).
        guidance_argument: Its name in ``__call__``.
        guidance_offset: Added to the scale, of classes where no guidance is 0 instead of 1.
        packing: How the scheduler sees latents: as they are, as rows of ``2x2`` blocks, or as ``rows`` of elements.
        packs_noise: Whether ``__call__`` takes the noise in that form, too.
        pixels: Height and width of images whose network does not say; ``None`` for ``sample_size``.
        stride: Pixels of the decoder's latents per element of the noise, along an axis.
        num_frames: Frames of a video; 0 for images.
        float32_latents: Whether the class draws its noise in float32, whatever the network's precision.
        latent_scale: Key in the scheduler's config for the standard deviation of its latents.
        shift: Name of the function in the class's module that says how far timesteps are shifted; ``None`` if the
            scheduler's config does.
    """

    network: Literal["unet", "transformer"]
    text_width: str
    encodings: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]
    tokens: tuple[tuple[str, int | None], ...] = (("tokenizer", None),)
    longest: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    few_steps: Callable[[int], Mapping[str, Any]] | None = None
    call_defaults: tuple[str, ...] = ()
    negative: Literal["together", "apart", "none"] = "together"
    negative_prompt: str = ""
    mask: str | None = None
    ragged: Literal["list", "longest"] | None = None
    guidance: Literal["free", "embedded"] = "free"
    guidance_argument: str = "guidance_scale"
    guidance_offset: float = 0.0
    packing: Packing = "none"
    packs_noise: bool = True
    pixels: tuple[int, int] | None = None
    stride: int = 1
    num_frames: int = 0
    float32_latents: bool = False
    latent_scale: str | None = None
    shift: Literal["calculate_shift", "compute_empirical_mu"] | None = None

    def guidance_of(self, pipeline: Any) -> Guidance:
        """What guidance does to a pipeline's images; ``none`` for models that were distilled without it."""
        if self.guidance == "embedded":
            return "embedded" if getattr(pipeline, self.network).config.get("guidance_embeds") else "none"
        return "none" if pipeline.config.get("is_distilled") else "free"

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents ``(B, C, h, w)`` as the scheduler sees them."""
        if self.packing == "none":
            return latents
        b, c, h, w = latents.shape
        if self.packing == "rows":
            return latents.flatten(2).mT
        blocks = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return blocks.reshape(b, h * w // 4, 4 * c)

    def unpack(self, latents: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The inverse of :meth:`pack`, to ``(B, *shape)``."""
        if self.packing == "none":
            return latents
        c, h, w = shape
        if self.packing == "rows":
            return latents.mT.unflatten(2, (h, w))
        blocks = latents.view(-1, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return blocks.reshape(-1, c, h, w)

    def arguments(self, inputs: Mapping[str, torch.Tensor], guidance_scale: float) -> dict[str, Any]:
        """The conditioning as ``__call__`` takes it."""
        found: dict[str, Any] = dict(inputs)
        if self.negative == "apart" and guidance_scale <= 1:
            found = {name: value for name, value in found.items() if not name.startswith("negative_")}
        for name in _EMBEDS if self.ragged else ():
            if name not in found:
                continue
            mask = found.pop(f"{name}_mask").bool()
            if self.ragged == "list":
                found[name] = [row[kept] for row, kept in zip(found[name], mask, strict=True)]
            else:
                longest = int(mask.sum(1).max())
                found |= {name: found[name][:, :longest], f"{name}_mask": mask[:, :longest].long()}
        return found

    def sizes(
        self, pipeline: Any, height: int = 0, width: int = 0, num_frames: int = 0
    ) -> tuple[tuple[int, int], int, tuple[int, ...]]:
        """Height and width in pixels, number of frames (0 for images) and shape of the noise; 0 for the model's own.

        Raises:
            ValueError: If the noise of such images would not be whole.
        """
        config = getattr(pipeline, self.network).config
        factor = getattr(pipeline, "vae_scale_factor_spatial", None) or pipeline.vae_scale_factor
        own = self.pixels or (config.sample_size * factor,) * 2
        pixels, step = (height or own[0], width or own[1]), factor * max(self.stride, 2 if self.pixels else 1)
        for name, size in zip(("height", "width"), pixels, strict=True):
            if size % step:
                raise ValueError(
                    f"{name} must be a multiple of {step} pixels for a {type(pipeline).__name__}, not {size}"
                )
        side = tuple(size // (factor * self.stride) for size in pixels)
        channels = config.in_channels // (4 if self.packing == "2x2" else 1)
        if not self.num_frames:
            return pixels, 0, (channels, *side)
        frames, rate = num_frames or self.num_frames, pipeline.vae_scale_factor_temporal
        if (frames - 1) % rate:
            raise ValueError(f"num_frames must be 1 more than a multiple of {rate}, not {frames}")
        return pixels, frames, (channels, (frames - 1) // rate + 1, *side)

    def shift_of(self, pipeline: Any, latent_shape: tuple[int, ...], steps: int) -> float:
        """How far the timesteps of a schedule are shifted, which depends on the size of the noise."""
        latents = math.prod(latent_shape[1:]) // (1 if self.packing == "rows" else 4)
        function = getattr(sys.modules[_known(pipeline).__module__], self.shift or "")
        if self.shift == "compute_empirical_mu":
            return function(latents, steps)
        names = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))
        return function(latents, *(pipeline.scheduler.config.get(name, default) for name, default in names))


INTERFACES: dict[str, PipelineInterface] = {
    "StableDiffusionPipeline": PipelineInterface(
        "unet", "cross_attention_dim", (({"num_images_per_prompt": 1}, _EMBEDS),)
    ),
    "StableDiffusionXLPipeline": PipelineInterface("unet", "cross_attention_dim", (({}, (*_EMBEDS, *_POOLED)),)),
    "HunyuanDiTPipeline": PipelineInterface(
        "transformer",
        "cross_attention_dim",
        (
            ({"text_encoder_index": 0, "max_sequence_length": 77}, (*_EMBEDS, *_MASKS)),
            ({"text_encoder_index": 1, "max_sequence_length": 256}, _SECOND),
        ),
        (("tokenizer", 77),),
        options={"use_resolution_binning": False},
    ),
    "PixArtSigmaPipeline": PipelineInterface(
        "transformer",
        "caption_channels",
        (
            (
                {"clean_caption": is_bs4_available() and is_ftfy_available()},  # like the pipeline's own call
                ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
            ),
        ),
        (("tokenizer", 300),),
        options={"use_resolution_binning": False, "negative_prompt": None},
    ),
    "StableDiffusion3Pipeline": PipelineInterface(
        "transformer",
        "joint_attention_dim",
        (({"prompt_2": None, "prompt_3": None}, (*_EMBEDS, *_POOLED)),),
        (("tokenizer", None), ("tokenizer_3", 256)),
    ),
    "SanaSprintPipeline": PipelineInterface(
        "transformer",
        "caption_channels",
        (({}, ("prompt_embeds", "prompt_attention_mask")),),
        (("tokenizer", None),),
        longest=300,
        options={"use_resolution_binning": False},
        few_steps=lambda steps: {"intermediate_timesteps": 1.3 if steps == 2 else None},
        call_defaults=("complex_human_instruction",),
        negative="none",
        mask="prompt_attention_mask",
        guidance="embedded",
        float32_latents=True,
        latent_scale="sigma_data",
    ),
    "FluxPipeline": PipelineInterface(
        "transformer",
        "joint_attention_dim",
        (({"prompt_2": None}, ("prompt_embeds", "pooled_prompt_embeds", UNUSED)),),
        (("tokenizer_2", None),),
        longest=512,
        negative="none",
        guidance="embedded",
        packing="2x2",
        pixels=(1024, 1024),
        shift="calculate_shift",
    ),
    "Flux2KleinPipeline": PipelineInterface(
        "transformer",
        "joint_attention_dim",
        (({}, ("prompt_embeds", UNUSED)),),
        longest=512,
        negative="apart",
        packing="rows",
        packs_noise=False,
        pixels=(1024, 1024),
        stride=2,
        shift="compute_empirical_mu",
    ),
    "ZImagePipeline": PipelineInterface(
        "transformer",
        "cap_feat_dim",
        (({}, _EMBEDS),),
        longest=512,
        mask="prompt_embeds_mask",
        ragged="list",
        guidance_offset=-1.0,
        pixels=(1024, 1024),
        float32_latents=True,
        shift="calculate_shift",
    ),
    "QwenImagePipeline": PipelineInterface(
        "transformer",
        "joint_attention_dim",
        (({}, ("prompt_embeds", UNUSED)),),
        longest=512,
        negative="apart",
        negative_prompt=" ",
        mask="prompt_embeds_mask",
        ragged="longest",
        guidance_argument="true_cfg_scale",
        packing="2x2",
        pixels=(1024, 1024),
        shift="calculate_shift",
    ),
    "WanPipeline": PipelineInterface(
        "transformer",
        "text_dim",
        (({}, _EMBEDS),),
        longest=512,
        pixels=(480, 832),
        num_frames=81,
        float32_latents=True,
    ),
}


def quarters(spatial: tuple[int, ...]) -> int | tuple[int, ...]:
    """A patch size: a quarter of height and width, and 3, 2 or 1 of a video's latent frames."""
    *time, height, width = spatial
    sizes = [*(next(p for p in (3, 2, 1) if t % p == 0) for t in time), max(1, height // 4), max(1, width // 4)]
    return tuple(sizes) if len(set(sizes)) > 1 else sizes[0]


def interface_of(pipeline: Any) -> PipelineInterface:
    """The interface of a pipeline's class, or of its nearest known base class.

    Raises:
        ValueError: If there is none.
    """
    return INTERFACES[_known(pipeline).__name__]


def _known(pipeline: Any) -> type:
    for cls in type(pipeline).__mro__:
        if cls.__name__ in INTERFACES:
            return cls
    raise ValueError(f"{type(pipeline).__name__} is not supported; expected one of {sorted(INTERFACES)}")


def check_guidance(guidance_scale: float) -> None:
    """Raises ``ValueError`` unless images come out with this guidance scale."""
    if not 1 <= guidance_scale <= LARGEST_GUIDANCE:
        raise ValueError(f"guidance_scale must be from 1 to {LARGEST_GUIDANCE:g}, got {guidance_scale}")
