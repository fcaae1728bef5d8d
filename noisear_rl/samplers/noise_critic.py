"""A critic of noises: how good will the image be that a denoiser makes of this noise for this prompt?

``Q(prompt, noise)`` is regressed on rewards that were observed (``noisear critic``). It is far cheaper than an image
of a large denoiser, so that the best of many noises can be denoised alone
(:class:`~noisear_rl.samplers.critic_choice.CriticChoice`).

The network folds the noise to a coarse grid, since layouts are what a prompt asks for, and lets every cell attend to
the text. Besides the reward it can predict a thumbnail of the image: a few thousand numbers per image instead of one,
without which it learns noises by heart.

Shapes: ``B`` noises, ``L`` text tokens, ``d`` width, ``G`` cells per side.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from noisear_rl.checkpoints import find_checkpoint, load_weights
from noisear_rl.config import Fraction, NonNegativeInt, PositiveInt, check_config
from noisear_rl.denoisers import Denoiser
from noisear_rl.policy.config import TOKENS
from noisear_rl.policy.layers import TextLayer, TokenEmbedding, attend, project_keys_values
from noisear_rl.prompts.reader import PromptReader

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # by the rank of the latent's grid
DETAIL = 2  # pixels of a thumbnail per cell and side
GROUPS = 8


@dataclass
class NoiseCriticConfig:
    """Sizes of the network; the defaults fit the embedded denoisers.

    Attributes:
        latent_shape: ``(C, *spatial)`` of the denoiser's initial noise.
        text_encoder: What is read of a prompt; as in :class:`~noisear_rl.policy.NoiseARConfig`.
        text_dim: Width of the text; 1 for ``"tokens"``.
        text_vocabulary: Number of tokens; only for ``"tokens"``.
        text_length: The longest prompt in tokens; only for ``"tokens"``.
        text_layers: Layers of self-attention over the text.
        d_text: Width ``d`` of the text inside the network.
        d_model: Channels of the noise inside the network, a multiple of 8.
        n_blocks: Residual blocks.
        n_heads: Attention heads.
        grid: ``G``, cells per side: longer sides of the latent are folded to about that many.
        dropout: Dropout probability, active in train mode only.
    """

    latent_shape: tuple[PositiveInt, ...] = (4, 8, 8)
    text_encoder: str = TOKENS
    text_dim: PositiveInt = 1
    text_vocabulary: NonNegativeInt = 0
    text_length: NonNegativeInt = 0
    text_layers: NonNegativeInt = 2
    d_text: PositiveInt = 128
    d_model: PositiveInt = 64
    n_blocks: PositiveInt = 6
    n_heads: PositiveInt = 4
    grid: PositiveInt = 8
    dropout: Fraction = 0.1

    def __post_init__(self) -> None:
        check_config(self)
        if not 2 <= len(self.latent_shape) <= 1 + len(CONVOLUTIONS):
            raise ValueError(f"latent_shape must be (C, …) with one to three sides, got {self.latent_shape}")
        if self.d_model % GROUPS or self.d_text % self.n_heads or self.d_model % self.n_heads:
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of {GROUPS}, and both widths (d_text: {self.d_text}) of "
                f"n_heads ({self.n_heads})"
            )

    @property
    def fold(self) -> tuple[int, ...]:
        """Elements of the latent per cell and side."""
        return tuple(max(1, side // self.grid) for side in self.latent_shape[1:])

    @property
    def cells(self) -> tuple[int, ...]:
        """Cells per side."""
        return tuple(side // fold for side, fold in zip(self.latent_shape[1:], self.fold, strict=True))


class _Block(nn.Module):
    """A residual convolution whose channels the whole prompt scales, and attention of the cells to its words."""

    def __init__(self, config: NoiseCriticConfig):
        super().__init__()
        d = config.d_model
        convolution: Any = CONVOLUTIONS[len(config.cells) - 1]
        self.norm, self.first = nn.GroupNorm(GROUPS, d), convolution(d, d, 3, padding=1)
        self.scale, self.second = nn.Linear(config.d_text, 2 * d), convolution(d, d, 3, padding=1)
        self.attention_norm = nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, config.n_heads, batch_first=True)
        self.words = nn.Linear(config.d_text, d)
        for layer in (self.second, self.attention.out_proj):
            nn.init.zeros_(layer.weight)

    def forward(
        self, x: torch.Tensor, words: torch.Tensor, prompt: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        factor, shift = self.scale(prompt).unflatten(1, (2, -1)).unflatten(2, (-1, *[1] * (x.dim() - 2))).unbind(1)
        x = x + self.second(F.silu(self.first(F.silu(self.norm(x))) * (1 + factor) + shift))
        cells = self.attention_norm(x.flatten(2).mT)  # (B, G·G, d)
        read = attend(self.attention, cells, project_keys_values(self.attention, self.words(words)), mask)
        return x + read.mT.unflatten(2, x.shape[2:])


class NoiseCritic(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="noisear-rl",
    tags=["noise-prior", "diffusion", "reward-model"],
    license="apache-2.0",
):
    """Predicts the reward of the image of a noise; see the module docstring.

    Args:
        config: Sizes.

    Attributes:
        mean: Mean reward of the training images.
        std: Standard deviation of their rewards.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: NoiseCriticConfig):
        super().__init__()
        self.config = config
        d, cells = config.d_model, torch.Size(config.cells).numel()
        convolution: Any = CONVOLUTIONS[len(config.cells) - 1]
        self.embedding: nn.Module = nn.Sequential(
            nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, config.d_text)
        )
        if config.text_encoder == TOKENS:
            self.embedding = TokenEmbedding(config.text_vocabulary, config.text_length, config.d_text)
        self.text_layers = nn.ModuleList(
            TextLayer(config.d_text, 2 * config.d_text, config.n_heads, config.dropout)
            for _ in range(config.text_layers)
        )
        self.pool = nn.Linear(config.d_text, 1)
        self.fold = convolution(config.latent_shape[0], d, config.fold, config.fold)
        self.place = nn.Parameter(0.3 * torch.randn(d, *config.cells))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_blocks))
        self.norm = nn.GroupNorm(GROUPS, d)
        self.thumbnail = convolution(d, 3 * DETAIL ** len(config.cells), 1)
        self.head = nn.Sequential(
            convolution(d, d // 2, 1), nn.SiLU(), nn.Flatten(), nn.Dropout(config.dropout),
            nn.Linear(d // 2 * cells, 2 * config.d_text), nn.SiLU(), nn.Dropout(config.dropout),
        )  # fmt: skip
        self.asked, self.value = nn.Linear(config.d_text, 2 * config.d_text), nn.Linear(4 * config.d_text, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(
        self, noise: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicts rewards and thumbnails.

        Args:
            noise: ``(B, C, *spatial)``.
            text: ``(B, L, D)``.
            text_mask: ``(B, L)``, true where a token counts; ``None`` for all.

        Returns:
            Rewards ``(B,)`` in the units of the training, and thumbnails ``(B, 3·2ⁿ, *cells)`` of images in [0, 1],
            ``n`` sides folded into channels; see :func:`thumbnails`.
        """
        words = self.embedding(text[..., 0].long() if self.config.text_encoder == TOKENS else text)
        mask = None if text_mask is None else text_mask.bool()[:, None, None]
        for layer in self.text_layers:
            words = layer(words, mask)
        weight = self.pool(words)[..., 0]
        if text_mask is not None:
            weight = weight.masked_fill(~text_mask.bool(), -torch.inf)
        prompt = (weight.softmax(1)[..., None] * words).sum(1)
        x = self.fold(noise) + self.place
        for block in self.blocks:
            x = block(x, words, prompt, mask)
        x = F.silu(self.norm(x))
        seen = self.head(x)
        value = self.value(torch.cat([seen, seen * self.asked(prompt)], 1))[:, 0]
        return self.mean + self.std * value, 0.5 + self.thumbnail(x)

    def check_denoiser(self, denoiser: Denoiser, reader: PromptReader) -> None:
        """Checks that a denoiser's sizes match.

        Raises:
            ValueError: If the latent shape or a size of the text differs.
        """
        for name, other in {"latent_shape": tuple(denoiser.latent_shape), **reader.sizes}.items():
            if (own := getattr(self.config, name)) != other:
                raise ValueError(
                    f"the critic was made for another denoiser: its {name} is {own}, that of {denoiser.name!r} is "
                    f"{other}"
                )

    @classmethod
    def _load_as_safetensor(  # type: ignore[override]
        cls, model: Self, model_file: str, map_location: str, strict: bool
    ) -> Self:
        load_weights(model, model_file, map_location, str(model.config))
        return model


def thumbnails(images: torch.Tensor, config: NoiseCriticConfig) -> torch.Tensor:
    """What a critic predicts of images ``(B, 3, H, W)``: ``(B, 12, *cells)``, means of 2 × 2 parts of every cell.

    Raises:
        ValueError: If the latent is not two-dimensional.
    """
    if len(config.cells) != 2:
        raise ValueError(f"thumbnails are of images of two-dimensional latents, not of {config.latent_shape}")
    height, width = (DETAIL * side for side in config.cells)
    return F.pixel_unshuffle(F.adaptive_avg_pool2d(images, (height, width)), DETAIL)


def load_critic(path: str) -> NoiseCritic:
    """Loads a critic from a checkpoint, a run folder or the Hub, in eval mode.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the files are those of another network.
    """
    critic: Any = NoiseCritic.from_pretrained(find_checkpoint(path, "critic"))
    return critic.eval()
