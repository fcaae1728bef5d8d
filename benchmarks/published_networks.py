"""Denoising networks of published models, built from their configurations, for ``resources.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn

Text = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Network:
    """A denoising network.

    Attributes:
        cls: Its diffusers class.
        config: Published configuration where it differs from the defaults of the class.
        parameters: Published number of parameters.
        conditioning: Shapes of the tensors that the pipeline derives from one prompt, by argument name.
        evaluate: Calls the network with a latent, a timestep and the conditioning.
        latent_shape: ``(C, h, w)``, or ``(C, t, h, w)`` of a video.
    """

    cls: Any
    config: dict[str, Any]
    parameters: float
    conditioning: dict[str, tuple[int, ...]]
    evaluate: Callable[[nn.Module, torch.Tensor, torch.Tensor, Text], Any]
    latent_shape: tuple[int, ...] = (4, 128, 128)


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def meta(*shape: int) -> torch.Tensor:
    """Returns a tensor without data."""
    return torch.empty(shape, device="meta")


def evaluate_sdxl(network: nn.Module, x: torch.Tensor, t: torch.Tensor, text: Text) -> None:
    added = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": meta(1, 6)}
    network(x, t, text["prompt_embeds"], added_cond_kwargs=added)


def evaluate_hunyuan(network: nn.Module, x: torch.Tensor, t: torch.Tensor, text: Text) -> None:
    rotary = meta(64 * 64, 88), meta(64 * 64, 88)
    network(x, t, *text.values(), image_rotary_emb=rotary)


def evaluate_pixart(network: nn.Module, x: torch.Tensor, t: torch.Tensor, text: Text) -> None:
    sizes = {"resolution": None, "aspect_ratio": None}
    embeds, mask = text.values()
    network(x, embeds, t, added_cond_kwargs=sizes, encoder_attention_mask=mask)


def tokens(x: torch.Tensor, side: int) -> torch.Tensor:
    """A latent ``(1, C, h, w)`` as tokens of ``side`` × ``side`` of its positions: ``(1, L, C·side²)``."""
    return meta(1, x[0, 0].numel() // side**2, x.shape[1] * side**2)


def evaluate_flux(network: nn.Module, x: torch.Tensor, t: torch.Tensor, text: Text) -> None:
    prompt, pooled = text.values()
    places = {"img_ids": meta(x[0, 0].numel() // 4, 3), "txt_ids": meta(prompt.shape[1], 3)}
    config: Any = network.config
    guidance = {"guidance": meta(1)} if config["guidance_embeds"] else {}
    network(tokens(x, 2), prompt, pooled, t, **places, **guidance)


SDXL = Network(
    UNet2DConditionModel,
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
    2.567e9,
    {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)},
    evaluate_sdxl,
)
HUNYUAN_DIT = Network(
    HunyuanDiT2DModel,
    {"sample_size": 128, "in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40}
    | {"mlp_ratio": 4.3637, "use_style_cond_and_image_meta_size": False},
    1.5e9,
    {"prompt_embeds": (77, 1024), "prompt_attention_mask": (77,)}
    | {"prompt_embeds_2": (256, 2048), "prompt_attention_mask_2": (256,)},
    evaluate_hunyuan,
)
PIXART_SIGMA = Network(
    PixArtTransformer2DModel,
    {"sample_size": 128, "caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
    0.61e9,
    {"prompt_embeds": (300, 4096), "prompt_attention_mask": (300,)},
    evaluate_pixart,
)
SD3 = Network(
    SD3Transformer2DModel,
    {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
    | {"pos_embed_max_size": 192},
    2.03e9,
    {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},
    lambda network, x, t, text: network(x, *text.values(), t),
    (16, 128, 128),
)
SD35_MEDIUM = replace(
    SD3,
    config=SD3.config | {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    parameters=2.24e9,
)
SD35_LARGE = replace(
    SD3,
    config=SD3.config
    | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
    parameters=8.06e9,
)
FLUX_DEV = Network(
    FluxTransformer2DModel,
    {"guidance_embeds": True},
    11.9e9,
    {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
    evaluate_flux,
    (16, 128, 128),
)
FLUX_SCHNELL = replace(FLUX_DEV, config={}, conditioning={"prompt_embeds": (256, 4096), "pooled_prompt_embeds": (768,)})
FLUX2_KLEIN = Network(
    Flux2Transformer2DModel,
    {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
    | {"guidance_embeds": False},
    3.88e9,
    {"prompt_embeds": (512, 7680)},
    lambda network, x, t, text: network(tokens(x, 1), *text.values(), t, meta(1, 4096, 4), meta(1, 512, 4)),
    (128, 64, 64),
)
QWEN_IMAGE = Network(
    QwenImageTransformer2DModel,
    {},
    20.4e9,
    {"prompt_embeds": (512, 3584)},
    lambda network, x, t, text: network(tokens(x, 2), *text.values(), timestep=t, img_shapes=[[(1, 64, 64)]]),
    (16, 128, 128),
)
Z_IMAGE = Network(
    ZImageTransformer2DModel,
    {},
    6.15e9,
    {"prompt_embeds": (512, 2560)},
    lambda network, x, t, text: network([x[0, :, None]], t, [text["prompt_embeds"][0]]),
    (16, 128, 128),
)
SANA_SPRINT = Network(
    SanaTransformer2DModel,
    {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 1000.0},
    1.61e9,
    {"prompt_embeds": (300, 2304)},
    lambda network, x, t, text: network(x, *text.values(), t, meta(1)),
    (32, 32, 32),
)
SANA_SPRINT_SMALL = replace(
    SANA_SPRINT,
    config=SANA_SPRINT.config
    | {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16}
    | {"cross_attention_head_dim": 72, "cross_attention_dim": 1152},
    parameters=0.59e9,
)
WAN = Network(
    WanTransformer3DModel,
    {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    1.42e9,
    {"prompt_embeds": (512, 4096)},
    lambda network, x, t, text: network(x, t, *text.values()),
    (16, 21, 60, 104),
)
DISTINCT = {
    "sdxl, dreamshaper": SDXL,
    "sdxl-turbo": replace(SDXL, latent_shape=(4, 64, 64)),
    "sdxl-lightning": SDXL,
    "hunyuan-dit": HUNYUAN_DIT,
    "pixart-sigma": PIXART_SIGMA,
    "sd3": SD3,
    "sd3.5-medium": SD35_MEDIUM,
    "sd3.5-large-turbo": SD35_LARGE,
    "sana-sprint": SANA_SPRINT,
    "sana-sprint-0.6b": SANA_SPRINT_SMALL,
    "flux-dev": FLUX_DEV,
    "flux-schnell": FLUX_SCHNELL,
    "flux2-klein": FLUX2_KLEIN,
    "z-image-turbo": Z_IMAGE,
    "qwen-image": QWEN_IMAGE,
    "wan": WAN,
}
NETWORKS = {name: network for title, network in DISTINCT.items() for name in title.split(", ")}
GUIDED = ("sdxl", "dreamshaper", "hunyuan-dit", "pixart-sigma", "sd3", "sd3.5-medium", "qwen-image", "wan")  # 2 passes
