"""CLIPScore, and the code shared by all scorers built on CLIP.

Source: Radford et al. 2021 (arXiv 2103.00020), weights ``openai/clip-vit-large-patch14`` (ViT-L/14; the code is
MIT-licensed, the model card asks for research use). Rescaling: Hessel et al. 2021 (arXiv 2104.08718).
Preprocessing: OpenAI's, by torchvision on PIL (:class:`~noisear_rl.rewards.preprocess.Preprocess`), 224 px, 77 tokens.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F

from noisear_rl.rewards.preprocess import Preprocess
from noisear_rl.rewards.pretrained import PretrainedReward

VIT_L_14: dict[str, Any] = {
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
VIT_H_14: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}
Rescaling = Literal["hessel", "cosine"]


class CLIPReward(PretrainedReward):
    """Base class of the CLIP scorers; ``architecture`` has the fields of :class:`transformers.CLIPConfig`."""

    architecture = VIT_L_14
    cleans: ClassVar[bool] = False  # whether the original tokenizer cleans prompts first

    def build(self) -> torch.nn.Module:
        """See the base class."""
        from transformers import CLIPConfig, CLIPModel

        return CLIPModel(CLIPConfig(**self.architecture))

    def convert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Drops the position ids that older files contain."""
        return {name: value for name, value in state.items() if not name.endswith("position_ids")}

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        return super().tokenize([clean(prompt) for prompt in prompts] if self.cleans else prompts)

    def encode_text(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Unit vectors ``(B, D)`` of the prompts in float32, as half precision would round the cosines too much."""
        return (F.normalize(self.network.get_text_features(ids).pooler_output.float(), dim=-1),)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors ``(B, D)`` of images ``(B, 3, H, W)`` in [0, 1], to measure how much images differ."""
        self.load()
        with torch.no_grad():
            return self.image_features(self.preprocessing.exact(images).to(self.device, self.dtype)).float().cpu()

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit vectors ``(B, D)`` of preprocessed images in float32."""
        return F.normalize(self.network.get_image_features(pixels).pooler_output.float(), dim=-1)


class CLIPScore(CLIPReward):
    """Agreement between image and prompt according to CLIP ViT-L/14.

    Args:
        rescale: ``hessel`` is ``2.5 · max(cos, 0)`` in [0, 2.5], about 0.5 to 0.9, the definition of CLIPScore;
            ``cosine`` is the plain cosine in [-1, 1], as in the ``image-reward`` package.
        **options: See :class:`~noisear_rl.rewards.pretrained.PretrainedReward`.
    """

    name = "clip-score"
    source = "openai/clip-vit-large-patch14/model.safetensors"
    how = "Pass weights=FOLDER with model.safetensors of openai/clip-vit-large-patch14."
    default_tokenizer = "openai/clip-vit-large-patch14"
    preprocessing = Preprocess("torchvision")
    cleans = True

    def __init__(self, *args: Any, rescale: Rescaling = "hessel", **options: Any) -> None:
        if rescale not in get_args(Rescaling):
            raise ValueError(f"unknown rescale {rescale!r}; expected one of {get_args(Rescaling)}")
        super().__init__(*args, **options)
        self.rescale = rescale

    def compare(self, pixels: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        cosine = (self.image_features(pixels) * text[0]).sum(-1)
        return 2.5 * cosine.clamp(min=0) if self.rescale == "hessel" else cosine


class CLIPH(CLIPReward):
    """Agreement according to LAION's CLIP ViT-H/14: ``exp(logit_scale) · cos``, about 15 to 45.

    ReNO's CLIP term (Eyring et al. 2024). Source: ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, MIT licence.
    """

    name = "clip-h"
    architecture = VIT_H_14
    source = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K/model.safetensors"
    how = "Pass weights=FOLDER with model.safetensors of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."
    default_tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    preprocessing = Preprocess("transformers")

    def compare(self, pixels: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return self.network.logit_scale.exp() * (self.image_features(pixels) * text[0]).sum(-1)


def clean(prompt: str) -> str:
    """Cleans a prompt like the tokenizers of OpenAI and open_clip: fixed Unicode, no HTML entities, lower case."""
    try:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    except ImportError:
        if not prompt.isascii():
            message = "without ftfy, curly quotes and broken Unicode are not fixed: pip install 'noisear-rl[rewards]'"
            warnings.warn(message, stacklevel=2)
    return " ".join(html.unescape(html.unescape(prompt)).split()).lower()
