"""MPS: which of two images people prefer, under a condition that says what to look at.

Source: Zhang et al. 2024 (CVPR, ``Kwai-Kolors/MPS``), weights ``MPS_overall_checkpoint.pth`` (a CLIP ViT-H/14 and four
layers in which the image's tokens attend to the prompt's; see the repository for the licence).
Range: ``exp(logit_scale) · cos(text, image)``; the probability that an image is preferred to another of the same prompt
is the sigmoid of the score difference.
Preprocessing: ``CLIPImageProcessor`` of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, 224 px, 77 tokens.

Prompt tokens that have little to do with the condition are masked: their similarity to it, relative to the largest
one, must exceed a threshold. The original takes the maximum over the batch, so that a score depends on the other
prompts in the batch; here it is taken over the prompt's own tokens, unless ``batch_coupled`` selects the original way.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from noisear_rl.rewards.clip import VIT_H_14, CLIPReward
from noisear_rl.rewards.preprocess import Preprocess

OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)  # the condition of the overall score, as published by the authors
HEAD_WIDTH = 64
NAMES = {  # published → ours, within a layer
    "0.fn.norm": "cross_norm",
    "0.fn.to_q": "to_q",
    "0.fn.to_kv": "to_kv",
    "0.fn.to_out": "to_out",
    "0.fn.ff.0": "cross_up",
    "0.fn.ff.2": "cross_down",
    "1.fn.norm": "self_norm",
    "1.fn.fused_attn_ff_proj": "fused",
    "1.fn.attn_out": "self_out",
    "1.fn.ff_out.1": "self_down",
}


def gated(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU: the second half gates the first."""
    values, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * values


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``(…, T, HEAD_WIDTH)``."""
    frequency = 10000.0 ** -(torch.arange(0, HEAD_WIDTH, 2, device=x.device) / HEAD_WIDTH)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency  # (T, HEAD_WIDTH / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class CrossLayer(nn.Module):
    """Image tokens attend to the prompt, then to each other; keys and values have a single head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 4 * width
        self.heads = width // HEAD_WIDTH
        self.sizes = (width, HEAD_WIDTH, HEAD_WIDTH, 2 * inner)
        self.cross_norm, self.self_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.cross_up, self.cross_down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.fused = nn.Linear(width, sum(self.sizes), bias=False)
        self.self_out, self.self_down = nn.Linear(width, width, bias=False), nn.Linear(inner, width, bias=False)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """``q (B, heads, T, d)`` over ``k``, ``v`` ``(B, S, d)`` → ``(B, T, heads · d)``; true in the mask is read."""
        k, v = (part[:, None].expand(-1, self.heads, -1, -1) for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    def split(self, q: torch.Tensor) -> torch.Tensor:
        """``(B, T, heads · d)`` → ``(B, heads, T, d)``."""
        return q.unflatten(-1, (self.heads, HEAD_WIDTH)).transpose(1, 2)

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``x (B, T, D)``, ``text (B, L, D)``, ``mask (B, L)`` → ``(B, T, D)``."""
        h = self.cross_norm(x)
        k, v = self.to_kv(text).chunk(2, dim=-1)
        read = self.to_out(self.attend(self.split(self.to_q(h)), k, v, mask[:, None, None]))
        x = x + read + self.cross_down(gated(self.cross_up(h)))
        q, k, v, up = self.fused(self.self_norm(x)).split(self.sizes, dim=-1)
        return x + self.self_out(self.attend(rotate(self.split(q)), rotate(k), v, None)) + self.self_down(gated(up))


class MPSNetwork(nn.Module):
    """A CLIP with cross-attention layers on top."""

    def __init__(self, architecture: dict[str, Any], layers: int) -> None:
        from transformers import CLIPConfig, CLIPModel

        super().__init__()
        self.clip = CLIPModel(CLIPConfig(**architecture))
        self.layers = nn.ModuleList(CrossLayer(architecture["projection_dim"]) for _ in range(layers))

    def text_tokens(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of every token ``(B, L, D)`` and of the prompt ``(B, D)``."""
        output = self.clip.get_text_features(ids)
        return self.clip.text_projection(output.last_hidden_state), output.pooler_output

    def forward(self, pixels: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Features ``(B, D)`` of preprocessed images that attend to the prompt tokens which ``mask (B, L)`` keeps."""
        x = self.clip.visual_projection(self.clip.vision_model(pixels).last_hidden_state)
        for layer in self.layers:
            x = layer(x, text, mask)
        return x[:, 0]


class MPS(CLIPReward):
    """Multi-dimensional Preference Score, overall; see the module docstring.

    Args:
        condition: What the score looks at, in words.
        threshold: Relative similarity to the condition above which a prompt token is read, in [0, 1): 0.3 in the
            authors' scripts, which score one image; 0.01 in their network's ``forward``, with which their README
            computes the probability that one of two images is preferred.
        batch_coupled: Whether to take the largest similarity over the batch, like the original.
        **options: See :class:`~noisear_rl.rewards.pretrained.PretrainedReward`; ``weights`` must be given.
    """

    name = "mps"
    architecture = VIT_H_14
    layers = 4
    how = "Download MPS_overall_checkpoint.pth, linked from github.com/Kwai-Kolors/MPS, and pass weights=FILE."
    default_tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    preprocessing = Preprocess("transformers")

    def __init__(
        self,
        *args: Any,
        condition: str = OVERALL,
        threshold: float = 0.3,
        batch_coupled: bool = False,
        **options: Any,
    ) -> None:
        if not condition.strip() or not 0 <= threshold < 1:
            raise ValueError(f"expected a condition and a threshold in [0, 1), got {condition!r} and {threshold}")
        super().__init__(*args, **options)
        self.condition, self.threshold, self.batch_coupled = condition, threshold, batch_coupled
        self._condition: torch.Tensor | None = None

    def build(self) -> nn.Module:
        """See the base class."""
        return MPSNetwork(self.architecture, self.layers)

    def convert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See the base class. Rotary frequencies are dropped: they follow from the width."""
        converted = {}
        for name, value in super().convert(state).items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if match := re.fullmatch(r"cross_model\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
                layer, part, kind = match.groups()
                name = f"layers.{layer}.{NAMES.get(part, part)}.{kind}"
            converted[re.sub(r"^model\.", "clip.", name)] = value
        return converted

    def encode_text(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Token features ``(B, L, D)``, unit vectors ``(B, D)``, the tokens' similarity to the condition ``(B, L)``."""
        if self._condition is None:
            self._condition = self.network.text_tokens(self.tokenize([self.condition])[0])[0][0]
        tokens, pooled = self.network.text_tokens(ids)
        return tokens, F.normalize(pooled, dim=-1), (tokens @ self._condition.T).amax(-1)

    def compare(self, pixels: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        tokens, prompt, similarity = text
        largest = similarity.amax() if self.batch_coupled else similarity.amax(-1, keepdim=True)
        features = self.network(pixels, tokens, similarity / largest > self.threshold)
        return self.network.clip.logit_scale.exp() * (F.normalize(features, dim=-1) * prompt).sum(-1)
