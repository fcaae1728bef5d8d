"""ImageReward v1.0: how much people like an image of a prompt.

Source: Xu et al. 2023 (arXiv 2304.05977), weights ``THUDM/ImageReward`` (Apache-2.0), code ``image-reward`` 1.5: BLIP's
large image encoder, BERT-base that reads the prompt with cross-attention to the image, and five linear layers without
activations in between on the first token.
Range: standardised by the authors, about -2 to 2; papers report it times 100.
Preprocessing: OpenAI's CLIP, by torchvision on PIL, 224 px; 35 tokens, padded.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from noisear_rl.rewards.aesthetic import mlp_head
from noisear_rl.rewards.preprocess import Preprocess
from noisear_rl.rewards.pretrained import PretrainedReward

MEAN, STD = 0.16717362830052426, 1.0333394966054072
BLIP_LARGE: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 30524,  # BERT's 30522, and BLIP's [DEC] and [ENC]
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "is_decoder": True,  # adds cross-attention; the call itself disables the causal mask
    },
}
NAMES = (  # published → ours
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(.+)", r"vision.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12]\..+)", r"vision.encoder.layers.\1.layer_norm\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(.+)", r"vision.encoder.layers.\1.self_attn.qkv.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)", r"vision.encoder.layers.\1.self_attn.projection.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(.+)", r"vision.encoder.layers.\1.mlp.\2"),
    (r"blip\.visual_encoder\.norm\.(.+)", r"vision.post_layernorm.\1"),
    (r"blip\.text_encoder\.(.+)", r"text.\1"),
    (r"mlp\.(.+)", r"mlp.\1"),
)
UNUSED = (  # the heads of BLIP's pretraining and a buffer: not part of the score
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
)


class ImageReward(PretrainedReward):
    """ImageReward v1.0; see the module docstring and :class:`~noisear_rl.rewards.pretrained.PretrainedReward`."""

    name = "image-reward"
    architecture = BLIP_LARGE
    max_tokens = 35
    source = "THUDM/ImageReward/ImageReward.pt"
    how = "Pass weights=FILE with ImageReward.pt of THUDM/ImageReward."
    default_tokenizer = "google-bert/bert-base-uncased"
    preprocessing = Preprocess("torchvision")

    def build(self) -> torch.nn.Module:
        """See the base class."""
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        network = torch.nn.Module()
        network.vision = BlipVisionModel(BlipVisionConfig(**self.architecture["vision_config"]))
        network.text = BlipTextModel(BlipTextConfig(**self.architecture["text_config"]), add_pooling_layer=False)
        network.mlp = mlp_head(self.architecture["text_config"]["hidden_size"])
        return network

    def convert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See the base class."""
        return {own_name(name): value for name, value in state.items() if name not in UNUSED}

    def load(self) -> None:
        """See the base class."""
        with self._lock:
            super().load()
            self.network.mlp.float()  # tiny; keeps the resolution of the scores in half precision

    def encode_text(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens themselves: the text is read together with each image."""
        return ids, mask

    def compare(self, pixels: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        ids, mask = text
        patches = self.network.vision(pixels).last_hidden_state  # (B, 197, 1024)
        read = self.network.text(ids, attention_mask=mask, encoder_hidden_states=patches, is_decoder=False)
        return (self.network.mlp(read.last_hidden_state[:, 0].float())[:, 0] - MEAN) / STD


def own_name(name: str) -> str:
    """Maps a published weight name to the network's; an unknown name maps to one that no network has."""
    for pattern, replacement in NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return f"{name} (not a published name)"
