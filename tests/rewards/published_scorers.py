"""ImageReward and HPSv2 from their published weight names alone, in plain torch functions: the reference for ours.

Also sample images of many modes and sizes, on which preprocessing methods differ.
"""

import functools
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

PUBLISHED = Path(__file__).parents[1] / "files" / "published_scorers.json"
State = dict[str, torch.Tensor]


def shapes(scorer: str, layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the original state dict, with ``layers`` layers per stack."""
    found = {}
    for name, shape in json.loads(PUBLISHED.read_text())[scorer].items():
        count = re.search(r"\{(\d+)\}", name)
        for layer in range(min(int(count[1]), layers or int(count[1])) if count else 1):
            found[re.sub(r"\{\d+\}", str(layer), name)] = tuple(shape)
    return found


def narrow(scorer: str, seed: int = 0) -> State:
    """Random weights by published name: two layers per stack, a sixteenth of the width."""

    def size(name: str, full: int) -> int:
        fixed = full < 256 or full % 16 or full == 512 or (name.startswith("mlp.") and full == 1024)
        return full if fixed else full // 16

    return {
        name: random(name, tuple(size(name, full) for full in shape), torch.Generator().manual_seed(seed + i))
        for i, (name, shape) in enumerate(shapes(scorer, layers=2).items())
    }


def random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep activations of order one, so that an error is visible."""
    if name.endswith("position_ids"):
        return torch.arange(shape[-1])[None]
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        gain = 1.0 if name.startswith("mlp.") else 1.5
        return values / 2 if "embed" in name else values * gain / values[0].numel() ** 0.5
    is_scale = name.endswith("weight") or name == "logit_scale"
    return 1 + values / 5 if is_scale else values / 5


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, added: torch.Tensor) -> torch.Tensor:
    """Attention of ``(B, T, D)`` over ``(B, S, D)``; ``added`` to the scores ``(B, heads, T, S)``."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + added
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Names:
    """Layers of a state dict under a prefix."""

    def __init__(self, state: State, prefix: str):
        self.state, self.prefix = state, prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.state[self.prefix + name]

    def at(self, name: str) -> "Names":
        return Names(self.state, self.prefix + name)

    def layers(self, name: str) -> list["Names"]:
        count = len({key.split(name)[1].split(".")[0] for key in self.state if key.startswith(self.prefix + name)})
        return [self.at(f"{name}{i}.") for i in range(count)]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)


def image_reward(state: State, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, heads: int) -> torch.Tensor:
    """Scores ``(B,)``: tokens attend to all tokens of the prompt, then to all patches of the image."""
    eye = Names(state, "blip.visual_encoder.")
    x = F.conv2d(pixels, eye["patch_embed.proj.weight"], eye["patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([eye["cls_token"].expand(len(x), -1, -1), x], 1) + eye["pos_embed"]
    free = torch.zeros(1, 1, 1, 1)
    for block in eye.layers("blocks."):
        q, k, v = block.linear("attn.qkv", block.norm("norm1", x, 1e-6)).chunk(3, -1)
        x = x + block.linear("attn.proj", attend(q, k, v, heads, free))
        x = x + block.linear("mlp.fc2", F.gelu(block.linear("mlp.fc1", block.norm("norm2", x, 1e-6))))
    x = eye.norm("norm", x, 1e-6)
    reader = Names(state, "blip.text_encoder.")
    words = reader["embeddings.word_embeddings.weight"][ids]
    h = reader.norm(
        "embeddings.LayerNorm", words + reader["embeddings.position_embeddings.weight"][: ids.shape[1]], 1e-12
    )
    padding = (1.0 - mask.float())[:, None, None] * -10000
    for layer in reader.layers("encoder.layer."):
        for part, seen, added in (("attention.", None, padding), ("crossattention.", x, free)):
            attention, seen = layer.at(part), h if seen is None else seen
            q = attention.linear("self.query", h)
            k, v = attention.linear("self.key", seen), attention.linear("self.value", seen)
            read = attention.linear("output.dense", attend(q, k, v, heads, added))
            h = attention.norm("output.LayerNorm", read + h, 1e-12)
        up = F.gelu(layer.linear("intermediate.dense", h))
        h = layer.norm("output.LayerNorm", layer.linear("output.dense", up) + h, 1e-12)
    score, head = h[:, 0], Names(state, "mlp.layers.")
    for number in (0, 2, 4, 6, 7):
        score = head.linear(str(number), score)
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


def hpsv2(state: State, pixels: torch.Tensor, ids: torch.Tensor, heads: int) -> torch.Tensor:
    """Cosines ``(B,)``: the prompt's feature is that of its first largest token id, the end of text."""

    def transformer(tower: Names, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        for block in tower.layers("transformer.resblocks."):
            fused = F.linear(block.norm("ln_1", x, 1e-5), block["attn.in_proj_weight"], block["attn.in_proj_bias"])
            x = x + block.linear("attn.out_proj", attend(*fused.chunk(3, -1), heads, added))
            x = x + block.linear("mlp.c_proj", F.gelu(block.linear("mlp.c_fc", block.norm("ln_2", x, 1e-5))))
        return x

    eye, text = Names(state, "visual."), Names(state, "")
    x = F.conv2d(pixels, eye["conv1.weight"], stride=14).flatten(2).mT
    x = torch.cat([eye["class_embedding"].expand(len(x), 1, -1), x], 1) + eye["positional_embedding"]
    x = transformer(eye, eye.norm("ln_pre", x, 1e-5), torch.zeros(1, 1, 1, 1))
    image = eye.norm("ln_post", x[:, 0], 1e-5) @ eye["proj"]
    causal = torch.full((77, 77), -torch.inf).triu(1)
    h = transformer(text, text["token_embedding.weight"][ids] + text["positional_embedding"], causal)
    h = text.norm("ln_final", h, 1e-5)[torch.arange(len(ids)), ids.argmax(-1)] @ text["text_projection"]
    return F.cosine_similarity(image, h)


SAMPLE_IMAGES = (
    *("RGB 1x1", "RGB 2x3", "RGB 64x64", "RGB 224x224", "RGB 225x224", "RGB 224x225", "RGB 224x100", "RGB 331x500"),
    *("RGB 500x333", "RGB 1024x1024", "RGB 3840x2160", "RGB 1000x2", "RGB 7x900", "L 301x300", "LA 97x130"),
    *("RGBA 223x227", "P 333x222", "1 250x251", "CMYK 260x301", "I;16 257x300", "HSV 77x91", "YCbCr 515x233"),
    "F 231x240",
)


@functools.cache
def sample_image(name: str) -> Image.Image:
    """Shades and some noise, in the PIL mode and size given by the name."""
    mode, size = name.split()
    width, height = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(width * 10007 + height)
    coarse = torch.rand(1, 4, 9, 9, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)[0]
    pixels = (smooth * 255 + torch.randn(4, height, width, generator=generator) * 20).clamp(0, 255).byte()
    if mode == "I;16":
        return Image.fromarray(pixels[0].numpy().astype("uint16") * 257)
    rgba = Image.fromarray(pixels.permute(1, 2, 0).numpy(), "RGBA")
    return rgba.convert(mode) if mode in ("RGBA", "LA") else rgba.convert("RGB").convert(mode)
