"""Sizes and variants of the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from noisear_rl.config import ConfigError, Decay, NonNegativeInt, PositiveFloat, PositiveInt, check_config
from noisear_rl.patches import sequence_shape

# What a policy and a denoiser must agree on; for "tokens" the last two are the tokenizer's.
SIZES = ("latent_shape", "patch_size", "text_dim", "text_vocabulary", "text_length")
DENOISER, TOKENS = "denoiser", "tokens"  # the text encoders that are not names of models
Precision = Literal["float32", "bfloat16"]  # of a network in training: plain, or autocast


@dataclass
class NoiseARConfig:
    """Sizes of the policy; the defaults fit the embedded ``shapes`` denoiser.

    Attributes:
        latent_shape: ``(C, *spatial)`` of the denoiser's initial noise.
        patch_size: Patch side along every spatial axis, or one side per axis.
        text_encoder: What the policy reads of a prompt: ``"denoiser"`` (the denoiser's frozen text embedding),
            ``"tokens"`` (the denoiser's token ids, embedded by a table and positions that are trained with the
            policy), or the folder or Hub id of another frozen encoder that ``transformers`` loads, such as T5, a
            sentence encoder or a language model. :class:`~noisear_rl.prompts.reader.PromptReader` computes it.
        text_layers: Layers of self-attention over the text before the policy attends to it, trained with the policy;
            ``"paper"`` only. ``"tokens"`` has at least one: without it, no word would know its neighbours.
        text_dim: Width ``D`` of the text embedding; 1 for ``"tokens"``.
        text_vocabulary: With ``"tokens"``, number of tokens, taken from the tokenizer.
        text_length: With ``"tokens"``, the longest prompt in tokens, taken from the tokenizer.
        d_model: Width ``d``.
        d_ff: Hidden width of the feed-forward layers.
        n_heads: Attention heads.
        n_layers: Decoder blocks.
        n_prediction_head: Extra residual-free two-layer blocks in the heads (the authors' ablation).
        dropout: Dropout probability, active in train mode only.
        architecture: ``"paper"`` (pre-norm, joint head, starts as N(0, I)) or ``"released"`` (the authors'
            network, same state dict).
        positions: ``"learned"`` (starts as unit Gaussian vectors) or ``"sinusoidal"`` (the paper's default)
            position encodings; ``"paper"`` only. Neighbouring sinusoids are nearly parallel, which halves what
            a natural-gradient step of given KL achieves.
        text_features: ``"normalized"`` (LayerNorms of the embeddings and of the text layers' output) or ``"whitened"``
            (the same, decorrelated by statistics of the training prompts, which are fitted when training starts and
            kept in the checkpoint); ``"paper"`` only. Whitening lets the policy distinguish prompts that differ only in
            the order of their words from the first update on. It is meant for embeddings without text layers.
        text_scale: Factor on the initial values and outputs of cross-attention. With ``"whitened"``, 4 makes the text
            count as much as the position from the start.
        layouts: Layouts ``K`` between which the first patch chooses, with probabilities that a head computes from the
            text, so that the policy has several modes (:mod:`~noisear_rl.policy.layouts`); 0 for none. At most as many
            as a patch has elements; ``"paper"`` only. Pretraining on pairs of several layouts per prompt trains them.
        layout_temperature: Divides the logits of the layouts when one is chosen: below 1, likely layouts get likelier,
            for less diversity. Pretraining fits the logits themselves.
        temperature: Factor on the standard deviation. The authors sample with 0.5.
        log_variance: ``"predicted"`` along with the mean (the paper's), ``"shared"`` (one learned number per patch
            position, independent of prefix and text, as in PPO for continuous control) or ``"fixed"`` (0).
    """

    latent_shape: tuple[PositiveInt, ...] = (4, 8, 8)
    patch_size: PositiveInt | tuple[PositiveInt, ...] = 2
    text_encoder: str = DENOISER
    text_layers: NonNegativeInt = 0
    text_dim: PositiveInt = 256
    text_vocabulary: NonNegativeInt = 0
    text_length: NonNegativeInt = 0
    d_model: PositiveInt = 128
    d_ff: PositiveInt = 256
    n_heads: PositiveInt = 4
    n_layers: PositiveInt = 2
    n_prediction_head: NonNegativeInt = 0
    dropout: Decay = 0.0
    architecture: Literal["paper", "released"] = "paper"
    positions: Literal["learned", "sinusoidal"] = "learned"
    text_features: Literal["normalized", "whitened"] = "normalized"
    text_scale: PositiveFloat = 1.0
    layouts: NonNegativeInt = 0
    layout_temperature: PositiveFloat = 1.0
    temperature: PositiveFloat = 1.0
    log_variance: Literal["predicted", "shared", "fixed"] = "predicted"

    def __post_init__(self) -> None:
        check_config(self)
        if not isinstance(self.patch_size, int) and len(self.patch_size) != len(self.latent_shape) - 1:
            expected = f"one size or {len(self.latent_shape) - 1}, one per spatial axis, not {list(self.patch_size)}"
            raise ConfigError(type(self).__name__, f"patch_size must be {expected}")
        _, patch_dim = sequence_shape(self.latent_shape, self.patch_size)  # raises where the patches do not fit
        if self.layouts > patch_dim:
            raise ValueError(f"layouts must be at most {patch_dim}, the elements of a patch, not {self.layouts}")
        if not self.text_encoder:
            raise ValueError("text_encoder must not be empty")
        if self.text_encoder == TOKENS:
            self.text_dim, self.text_layers = 1, max(1, self.text_layers)
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(f"d_model ({self.d_model}) must be even and divisible by n_heads ({self.n_heads})")
        if self.architecture == "released" and (self.text_features, self.text_scale) != ("normalized", 1.0):
            raise ValueError("text_features and text_scale belong to architecture='paper'")
        if self.architecture == "released" and self.layouts:
            raise ValueError("layouts belong to architecture='paper'")
        if self.architecture == "released" and self.text_layers:
            raise ValueError("text_layers and text_encoder='tokens' belong to architecture='paper'")
        if self.architecture == "paper" and self.n_prediction_head:
            raise ValueError("n_prediction_head belongs to architecture='released'")
        if self.architecture == "released" and self.log_variance != "predicted":
            raise ValueError("architecture='released' predicts its log-variance")

    def resized(self, sizes: Mapping[str, Any]) -> NoiseARConfig:
        """The same policy in a denoiser's sizes.

        Raises:
            ValueError: If a size was set to another value; sizes left at their defaults are replaced.
        """
        for field in fields(self):
            if field.name in sizes and getattr(self, field.name) not in (field.default, sizes[field.name]):
                raise ValueError(
                    f"the policy's {field.name} is {getattr(self, field.name)}, the denoiser's {sizes[field.name]}: "
                    "was it meant for another denoiser? Leave it out to get the denoiser's"
                )
        return replace(self, **sizes)

    def check_sizes(self, sizes: Mapping[str, Any], owner: str) -> None:
        """Refuses a policy that was made for something else.

        Args:
            sizes: What it must agree on, by the names of :data:`SIZES`; those left out may differ.
            owner: Whose sizes they are, for the message.

        Raises:
            ValueError: If latent shape, patch size or text width differ.
        """
        for name in SIZES:
            if name in sizes and getattr(self, name) != sizes[name]:
                raise ValueError(
                    f"the policy was made for another denoiser or patch size: its {name} is {getattr(self, name)}, "
                    f"that of {owner} is {sizes[name]}"
                )
