"""Sizes and classes of the embedded denoiser: SDXL's components, small enough for two CPU cores.

Every builder returns an untrained module of the class that SDXL uses.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)
from transformers.tokenization_utils_base import AddedToken

from noisear_rl.denoisers.shapes import ASSETS
from noisear_rl.denoisers.shapes.captions import vocabulary
from noisear_rl.denoisers.shapes.world import IMAGE_SIZE

LATENT_SHAPE = (4, 8, 8)
TEXT_TOKENS = 16
TEXT_WIDTH = 128
START, END, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"

# SDXL's noise schedule; ``leading`` starts below the last training step, so that the noise shapes the image.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
}

# One step, from the timestep where the teacher's four start, directly to the clean latent.
TURBO_SCHEDULE = SCHEDULE | {"steps_offset": 751, "set_alpha_to_one": True}


def build_vae() -> AutoencoderKL:
    """8× autoencoder, latent ``(4, 8, 8)``."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_unet(turbo: bool = False) -> UNet2DConditionModel:
    """Two levels as in SDXL: plain residual blocks at 8×8, attention to the text at 4×4.

    Args:
        turbo: Build the smaller network of ``shapes-turbo``: no middle block, and a narrow time embedding, because
            the timestep is always the same.
    """
    smaller = {"mid_block_type": None, "time_embedding_dim": 32} if turbo else {}
    return UNet2DConditionModel(
        **smaller,
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=(96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + TEXT_WIDTH,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token per caption word; other letters are ``UNKNOWN``."""
    vocab = {token: i for i, token in enumerate((START, END, UNKNOWN))}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(
            folder, bos_token=START, eos_token=END, pad_token=END, unk_token=UNKNOWN, model_max_length=TEXT_TOKENS
        )
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True, rstrip=True) for word in vocabulary()])
    return tokenizer


class Tokenizer:
    """Captions → token ids ``(B, L)``, as computed by the pipeline's ``encode_prompt``."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(
            texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids


def _text_config(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 3 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_TOKENS,
        "projection_dim": TEXT_WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_clip() -> CLIPModel:
    """Text and image towers of width 128; 8×8 patches."""
    vision = CLIPVisionConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=TEXT_WIDTH,
    )
    text = CLIPTextConfig(**_text_config(build_tokenizer()))
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH))


def load_clip(assets: Path = ASSETS) -> CLIPModel:
    """The trained CLIP in float32, frozen.

    Its text tower is the pipeline's first text encoder and stored only there; it is rounded to float16 like the rest.
    """
    clip = CLIPModel(CLIPConfig.from_pretrained(assets / "clip"))
    state = load_file(assets / "clip" / "model.safetensors")
    for name, value in load_file(assets / "pipeline" / "text_encoder" / "model.safetensors").items():
        state[f"text_model.{name.removeprefix('text_model.')}"] = value.half()
    clip.load_state_dict(state)
    return clip.float().eval().requires_grad_(False)


def build_text_encoders(clip: CLIPModel) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders of the pipeline, initialised from CLIP's text tower."""
    first = CLIPTextModel(clip.config.text_config)
    second = CLIPTextModelWithProjection(clip.config.text_config)
    tower = clip.text_model.state_dict()
    for model in (first, second):
        own = model.state_dict()
        renamed = {k: tower.get(k, tower.get(k.removeprefix("text_model."))) for k in own}
        if "text_projection.weight" in own:
            renamed["text_projection.weight"] = clip.text_projection.weight
        missing = [k for k, v in renamed.items() if v is None]
        if missing:
            raise RuntimeError(f"text tower has no weights for {missing}")
        model.load_state_dict(renamed)
    return first.eval().requires_grad_(False), second
