"""Sizes and variants of the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import isqrt
from typing import Any

from noisear_rl.patches import sequence_shape

ARCHITECTURES = ("paper", "reference")
LOG_VARIANCES = ("predicted", "shared", "fixed")
SIZES = ("latent_shape", "patch_size", "text_dim")  # what a policy and a denoiser must agree on


@dataclass
class NoiseARConfig:
    """Sizes of the policy; the defaults fit the embedded ``shapes`` denoiser.

    Attributes:
        latent_shape: ``(C, *spatial)`` of the denoiser's initial noise.
        patch_size: Patch side along every spatial axis.
        text_dim: Width ``D`` of the text embedding.
        d_model: Width ``d``.
        d_ff: Hidden width of the feed-forward layers.
        n_heads: Attention heads.
        n_layers: Decoder blocks.
        n_prediction_head: Extra residual-free two-layer blocks in the heads (the reference's ablation).
        dropout: Dropout probability, active in train mode only.
        architecture: ``"paper"`` (pre-norm, joint head, starts as N(0, I)) or ``"reference"`` (the authors'
            released network, same state dict).
        positions: ``"learned"`` (starts as unit Gaussian vectors) or ``"sinusoidal"`` (the paper's default)
            position encodings; ``"paper"`` only. Neighbouring sinusoids are nearly parallel, which halves what
            a natural-gradient step of given KL achieves.
        temperature: Factor on the standard deviation. The authors sample with 0.5.
        log_variance: ``"predicted"`` beside the mean (the paper's), ``"shared"`` (one learned number a patch
            position, whatever prefix and text, as PPO for continuous control has it) or ``"fixed"`` (0).
    """

    latent_shape: tuple[int, ...] = (4, 8, 8)
    patch_size: int = 2
    text_dim: int = 256
    d_model: int = 128
    d_ff: int = 256
    n_heads: int = 4
    n_layers: int = 2
    n_prediction_head: int = 0
    dropout: float = 0.0
    architecture: str = "paper"
    positions: str = "learned"
    temperature: float = 1.0
    log_variance: str = "predicted"

    def __post_init__(self) -> None:
        self.latent_shape = tuple(self.latent_shape)
        sequence_shape(self.latent_shape, self.patch_size)  # raises where the patches do not fit
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.architecture!r}; expected one of {ARCHITECTURES}")
        if self.positions not in ("sinusoidal", "learned"):
            raise ValueError(f"positions must be 'sinusoidal' or 'learned', not {self.positions!r}")
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(f"d_model ({self.d_model}) must be even and divisible by n_heads ({self.n_heads})")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.architecture == "paper" and self.n_prediction_head:
            raise ValueError("n_prediction_head belongs to architecture='reference'")
        if self.log_variance not in LOG_VARIANCES:
            raise ValueError(f"unknown log_variance {self.log_variance!r}; expected one of {LOG_VARIANCES}")
        if self.architecture == "reference" and self.log_variance != "predicted":
            raise ValueError("architecture='reference' predicts its log-variance")

    def resized(self, sizes: Mapping[str, Any]) -> NoiseARConfig:
        """The same policy in a denoiser's sizes, the keys of which are :data:`SIZES`.

        Raises:
            ValueError: If a size was set, and to another value; one left at its default gives way.
        """
        for field in fields(self):
            if field.name in sizes and getattr(self, field.name) not in (field.default, sizes[field.name]):
                raise ValueError(
                    f"the policy's {field.name} is {getattr(self, field.name)}, the denoiser's {sizes[field.name]}: "
                    "was it meant for another denoiser? Leave it out to get the denoiser's"
                )
        return replace(self, **sizes)

    def size_mismatch(self, sizes: Mapping[str, Any]) -> str | None:
        """The first of the given sizes that differs from the policy's own; ``None`` if all agree."""
        return next((name for name in SIZES if name in sizes and getattr(self, name) != sizes[name]), None)


def reference_config(state: Mapping[str, Any], n_heads: int = 1) -> NoiseARConfig:
    """Reads the sizes of the authors' released network off its state dict.

    The number of heads leaves no trace there; theirs is 1. Latents are square with four channels, as theirs are.

    Args:
        state: Tensors by name.
        n_heads: Attention heads.

    Raises:
        ValueError: If a tensor is missing or the sizes do not fit together.
    """
    try:
        patch_elements = state["latent_patch_encoder.0.weight"].shape[1]
        patches = state["pos_encoding"].shape[1] - 1
        d_model = state["learnable_start_token_emb"].shape[0]
        d_ff = state["ffn_layers.0.0.weight"].shape[0]
        head = [name for name in state if name.startswith("prediction_head_mu.") and name.endswith(".weight")]
        first = state["prediction_head_mu.0.weight"].shape[0]
        text_dim = state["dim_adapter.weight"].shape[1] if "dim_adapter.weight" in state else d_model
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"not a state dict of the authors' network: {error} is missing or no tensor") from error
    patch_size, side = isqrt(patch_elements // 4), isqrt(patches)
    if 4 * patch_size**2 != patch_elements or side**2 != patches:
        raise ValueError(f"{patches} patches of {patch_elements} elements do not tile a square latent of 4 channels")
    # Two layers are the published head; 2k + 1 are k further blocks.
    blocks = len(head) // 2 if len(head) % 2 else 0
    if len(head) not in (2, 2 * blocks + 1) or first != 2 * d_model:
        raise ValueError(f"a prediction head of {len(head)} layers is not one of the authors'")
    return NoiseARConfig(
        latent_shape=(4, side * patch_size, side * patch_size),
        patch_size=patch_size,
        text_dim=text_dim,
        d_model=d_model,
        d_ff=d_ff,
        n_heads=n_heads,
        n_layers=len({name.split(".")[1] for name in state if name.startswith("self_attn_norm.")}),
        n_prediction_head=blocks,
        dropout=0.15,
        architecture="reference",
        temperature=0.5,
    )
