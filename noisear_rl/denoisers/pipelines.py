"""The differences between diffusers' text-to-image pipelines, and two ways to look into their loop from outside.

Everything else is the pipeline's own ``encode_prompt`` and ``__call__``. To support another class that accepts
``latents`` and prompt embeddings, add an entry to :data:`INTERFACES`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available

LARGEST_GUIDANCE = 1000.0  # beyond it images are noise, or NaN
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
_MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_SECOND = tuple(f"{name}_2" for name in (*_EMBEDS, *_MASKS))


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
        options: Additional keyword arguments of ``__call__``.
    """

    network: Literal["unet", "transformer"]
    text_width: str
    encodings: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]
    tokens: tuple[tuple[str, int | None], ...] = (("tokenizer", None),)
    options: Mapping[str, Any] = field(default_factory=dict)


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
        {"use_resolution_binning": False},
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
        {"use_resolution_binning": False, "negative_prompt": None},
    ),
    "StableDiffusion3Pipeline": PipelineInterface(
        "transformer",
        "joint_attention_dim",
        (({"prompt_2": None, "prompt_3": None}, (*_EMBEDS, *_POOLED)),),
        (("tokenizer", None), ("tokenizer_3", 256)),
    ),
}


def interface_of(pipeline: Any) -> PipelineInterface:
    """The interface of a pipeline's class, or of its nearest known base class.

    Raises:
        ValueError: If there is none.
    """
    for cls in type(pipeline).__mro__:
        if cls.__name__ in INTERFACES:
            return INTERFACES[cls.__name__]
    raise ValueError(f"{type(pipeline).__name__} is not supported; expected one of {sorted(INTERFACES)}")


class ProbeScheduler:
    """A scheduler that takes no step and records the guided prediction.

    A pipeline that runs with it evaluates its network once, with all the conditions that its class adds (sizes, rotary
    embeddings, styles) and without learned variances, so that none of this is duplicated here.

    Args:
        config: Configuration of the scheduler that it replaces.
        timestep: Timestep to evaluate.

    Attributes:
        prediction: The guided prediction ``(B, C, h, w)``.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], timestep: float) -> None:
        self.config, self.timesteps = config, torch.tensor([timestep])
        self.prediction = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
        """Keeps the single timestep."""
        self.timesteps = self.timesteps.to(device)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Returns the input unchanged."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor]:
        """Records the prediction."""
        self.prediction = model_output
        return (sample,)


@contextlib.contextmanager
def scheduled_by(pipeline: Any, scheduler: Any) -> Iterator[None]:
    """Runs a pipeline with another scheduler, without changing the pipeline's configuration."""
    own = pipeline.scheduler
    object.__setattr__(pipeline, "scheduler", scheduler)
    try:
        yield
    finally:
        object.__setattr__(pipeline, "scheduler", own)


@contextlib.contextmanager
def last_latents(scheduler: Any) -> Iterator[list[torch.Tensor]]:
    """Records the latents of a scheduler's last step, as not all pipelines have a callback."""
    own, found = scheduler.step, [torch.empty(0)]

    @functools.wraps(own)  # pipelines read the signature
    def step(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        found[0] = output[0]
        return output

    scheduler.step = step
    try:
        yield found
    finally:
        del scheduler.step


def check_guidance(guidance_scale: float) -> None:
    """Raises ``ValueError`` unless images come out with this guidance scale."""
    if not 1 <= guidance_scale <= LARGEST_GUIDANCE:
        raise ValueError(f"guidance_scale must be from 1 to {LARGEST_GUIDANCE:g}, got {guidance_scale}")
