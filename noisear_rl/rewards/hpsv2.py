"""Human Preference Score v2 and v2.1: which of two images of the same prompt people prefer.

Source: Wu et al. 2023 (arXiv 2306.09341), weights ``xswu/HPSv2`` (a CLIP ViT-H/14, Apache-2.0), code ``hpsv2`` 1.2.0.
Range: the cosine of text and image in [-1, 1], in practice 0.2 to 0.35; papers report it times 100. Scores are only
comparable between images of the same prompt.
Preprocessing: the longer side to 224 px between black bars, in floating-point values; 77 CLIP tokens of the cleaned
prompt (fixed Unicode, no HTML entities, lower case).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from noisear_rl.rewards.clip import VIT_H_14, CLIPReward
from noisear_rl.rewards.preprocess import Preprocess

NAMES = {  # published → ours
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
LAYER_NAMES = {  # within a layer; attn.in_proj fuses queries, keys and values
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class HPSv2(CLIPReward):
    """Human Preference Score v2; see the module docstring.

    Args:
        antialias: Whether to smooth images when shrinking them. ``hpsv2`` leaves this to torchvision, which does so
            since 0.17, but did not when HPSv2 was trained and its tables were made.
        **options: See :class:`~noisear_rl.rewards.pretrained.PretrainedReward`.
    """

    name = "hpsv2"
    architecture = VIT_H_14
    source = "xswu/HPSv2/HPS_v2_compressed.pt"
    how = "Pass weights=FILE with HPS_v2_compressed.pt of xswu/HPSv2."
    default_tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    preprocessing = Preprocess("float")
    cleans = True

    def __init__(self, *args: Any, antialias: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.preprocessing = replace(self.preprocessing, antialias=antialias)  # type: ignore[misc]

    def convert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See the base class."""
        converted = {}
        for name, value in state.items():
            match = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
            tower, number, part, kind = match.groups() if match else (None, "", "", "")
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            if part == "attn.in_proj":
                for letter, third in zip("qkv", value.chunk(3), strict=False):
                    converted[f"{layer}.self_attn.{letter}_proj.{kind}"] = third
            elif part in LAYER_NAMES:
                converted[f"{layer}.{LAYER_NAMES[part]}.{kind}"] = value
            elif name in TRANSPOSED:
                converted[TRANSPOSED[name]] = value.T.contiguous()
            else:
                converted[NAMES.get(name, f"{name} (not a published name)")] = value
        return converted

    def compare(self, pixels: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return (self.image_features(pixels) * text[0]).sum(-1)


class HPSv21(HPSv2):
    """Version 2.1: the same network, trained on better images. Its scores are not comparable with version 2's."""

    name = "hpsv2.1"
    source = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    how = "Pass weights=FILE with HPS_v2.1_compressed.pt of xswu/HPSv2."
