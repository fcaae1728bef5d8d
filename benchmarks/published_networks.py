"""Denoising networks of published models, built from their configurations, for ``resources.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import HunyuanDiT2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
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
        latent_channels: Channels ``C`` of its 128 × 128 latent.
    """

    cls: Any
    config: dict[str, Any]
    parameters: float
    conditioning: dict[str, tuple[int, ...]]
    evaluate: Callable[[nn.Module, torch.Tensor, torch.Tensor, Text], Any]
    latent_channels: int = 4

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """``(C, h, w)``."""
        return (self.latent_channels, 128, 128)


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
    16,
)
NETWORKS = {"sdxl": SDXL, "dreamshaper": SDXL, "hunyuan-dit": HUNYUAN_DIT, "pixart-sigma": PIXART_SIGMA, "sd3": SD3}
DISTINCT = {"sdxl, dreamshaper": SDXL, "hunyuan-dit": HUNYUAN_DIT, "pixart-sigma": PIXART_SIGMA, "sd3": SD3}
