"""Published pipelines at full size with random weights, so that ``full_size.py`` needs no download.

Configurations are the published ones; tokenizers are small, as their size costs nothing. Weights are one block of
normal numbers, repeated and divided by the root of the number of inputs: images mean nothing, but they are finite and
their cost is real.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiTPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from published_networks import NETWORKS, parameters_of  # in this folder
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from noisear_rl.denoisers.shapes.architecture import build_tokenizer

BLOCK = 1_048_583  # a prime, so that rows of a matrix differ
WORDS = ("a", "photo", "of", "lighthouse", "at", "dawn")
SDXL_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
MT5_XL = {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 250112}
BERT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def fill(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Replaces parameters without data by random ones; the same every time."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(device)
    filled: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by identity: shared parameters stay shared
    for owner in module.modules():
        for name, empty in list(owner._parameters.items()):
            if empty is None:
                continue
            if id(empty) not in filled:
                values = torch.empty(empty.shape, dtype=dtype, device=device)
                if empty.dim() > 1:
                    scaled, flat = (block / empty[0].numel() ** 0.5).to(dtype), values.view(-1)
                    for start in range(0, len(flat), BLOCK):
                        flat[start : start + BLOCK] = scaled[: len(flat) - start]
                else:
                    values.fill_(1.0 if name == "weight" else 0.0)  # norms and biases
                filled[id(empty)] = empty, nn.Parameter(values, requires_grad=False)
            owner._parameters[name] = filled[id(empty)][1]
    return module.eval()


def clip_tokenizer() -> CLIPTokenizer:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def t5_tokenizer(length: int) -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0), *((f"▁{word}", -2.0) for word in WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def bert_tokenizer() -> BertTokenizer:
    vocab = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    return BertTokenizer(vocab=vocab, model_max_length=77)


def vae(**options: Any) -> AutoencoderKL:
    """The autoencoder of SDXL, or of another model with the same blocks."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=1024,
        **{"latent_channels": 4, "scaling_factor": 0.13025} | options,
    )


def clip(sizes: dict[str, int], projected: bool, activation: str) -> nn.Module:
    tokenizer = clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(**sizes, **ends, projection_dim=sizes["hidden_size"], hidden_act=activation)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(sizes: dict[str, int]) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**sizes, d_kv=64, feed_forward_proj="gated-gelu", is_encoder_decoder=False))


@dataclass(frozen=True)
class Published:
    """A pipeline.

    Attributes:
        pipeline: Its class.
        network: Name of its denoising network in :data:`published_networks.NETWORKS`, and of the argument for it.
        modules: Builds its other networks, by argument.
        parts: Builds tokenizers and the scheduler, by argument.
        parameters: Published number of parameters of the other networks together.
        options: Other arguments.
    """

    pipeline: type[DiffusionPipeline]
    network: tuple[str, str]
    modules: dict[str, Callable[[], nn.Module]]
    parts: dict[str, Callable[[], Any]]
    parameters: float
    options: dict[str, Any]


def flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def turbo() -> EulerAncestralDiscreteScheduler:
    return EulerAncestralDiscreteScheduler(**SDXL_SCHEDULE, timestep_spacing="trailing")


_SDXL_MODULES: dict[str, Callable[[], nn.Module]] = {
    "vae": vae,
    "text_encoder": lambda: clip(CLIP_L, False, "quick_gelu"),
    "text_encoder_2": lambda: clip(CLIP_G, True, "gelu"),
}
_SDXL_PARTS: dict[str, Callable[[], Any]] = {"tokenizer": clip_tokenizer, "tokenizer_2": clip_tokenizer}
PUBLISHED = {
    "sdxl": Published(
        StableDiffusionXLPipeline,
        ("sdxl", "unet"),
        _SDXL_MODULES,
        _SDXL_PARTS | {"scheduler": lambda: DPMSolverMultistepScheduler(**SDXL_SCHEDULE)},
        0.0837e9 + 0.1231e9 + 0.6947e9,
        {"add_watermarker": False},
    ),
    "sdxl-turbo": Published(
        StableDiffusionXLPipeline,
        ("sdxl", "unet"),
        _SDXL_MODULES,
        _SDXL_PARTS | {"scheduler": turbo},
        0.0837e9 + 0.1231e9 + 0.6947e9,
        {"add_watermarker": False},
    ),
    "hunyuan-dit": Published(
        HunyuanDiTPipeline,
        ("hunyuan-dit", "transformer"),
        {"vae": vae, "text_encoder": lambda: BertModel(BertConfig(**BERT, vocab_size=47020))}
        | {"text_encoder_2": lambda: t5(MT5_XL)},
        {"tokenizer": bert_tokenizer, "tokenizer_2": lambda: t5_tokenizer(256)}
        | {"scheduler": lambda: DDPMScheduler(**SDXL_SCHEDULE, prediction_type="v_prediction")},
        0.0837e9 + 0.352e9 + 1.67e9,
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "pixart-sigma": Published(
        PixArtSigmaPipeline,
        ("pixart-sigma", "transformer"),
        {"vae": vae, "text_encoder": lambda: t5(T5_XXL)},
        {"tokenizer": lambda: t5_tokenizer(300)}
        | {"scheduler": lambda: DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)},
        0.0837e9 + 4.762e9,
        {},
    ),
    "sd3": Published(
        StableDiffusion3Pipeline,
        ("sd3", "transformer"),
        {
            "vae": lambda: vae(
                latent_channels=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": lambda: clip(CLIP_L, True, "quick_gelu"),
            "text_encoder_2": lambda: clip(CLIP_G, True, "gelu"),
            "text_encoder_3": lambda: t5(T5_XXL),
        },
        {"tokenizer": clip_tokenizer, "tokenizer_2": clip_tokenizer, "tokenizer_3": lambda: t5_tokenizer(256)}
        | {"scheduler": flow},
        0.0838e9 + 0.1237e9 + 0.6947e9 + 4.762e9,
        {},
    ),
}


def empty_modules(name: str) -> dict[str, nn.Module]:
    """Returns a pipeline's networks by argument, without weights.

    Raises:
        ValueError: If the number of parameters differs from the published one by more than 1 %.
    """
    published = PUBLISHED[name]
    network = NETWORKS[published.network[0]]
    with init_empty_weights(include_buffers=False):
        modules = {key: make() for key, make in published.modules.items()}
        modules[published.network[1]] = network.cls(**network.config)
    for module in modules.values():
        if isinstance(module, PreTrainedModel):
            module.tie_weights()
    for what, counted, expected in (
        ("denoising network", parameters_of(modules[published.network[1]]), network.parameters),
        ("other networks", sum(parameters_of(modules[key]) for key in published.modules), published.parameters),
    ):
        if abs(counted / expected - 1) > 0.01:
            raise ValueError(f"{name}: the {what} has {counted:.4g} parameters, but {expected:.4g} are published")
    return modules


def build_pipeline(name: str, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    """Builds a pipeline of :data:`PUBLISHED` with random weights."""
    published = PUBLISHED[name]
    modules: dict[str, Any] = {key: fill(module, dtype, device) for key, module in empty_modules(name).items()}
    pipeline = published.pipeline(**modules, **{k: make() for k, make in published.parts.items()}, **published.options)
    return pipeline.to(device, dtype)  # buffers
