"""Layers of the policy: attention whose keys and values can be kept, position encodings, prediction heads.

Shapes: ``B`` batch, ``T`` tokens, ``d`` width, ``H`` heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Autocast to bfloat16, or none; tensors without data (``meta``) count as those of a CPU."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, torch.bfloat16, enabled=enabled)


def sinusoidal_encoding(length: int, width: int) -> torch.Tensor:
    """Sine on even and cosine on odd channels: ``(1, length, width)``."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    return torch.stack([(position * rate).sin(), (position * rate).cos()], -1).reshape(1, length, width)


def split_heads(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """``(B, T, d)`` → ``(B, H, T, d/H)``."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def distinct_rows(
    text: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Finds rows of the same text.

    Args:
        text: ``(B, T, D)``.
        mask: ``(B, T)`` or ``None``.

    Returns:
        The first row of each text ``(U,)`` and which of them every row equals ``(B,)``, or nothing if fewer than half
        of the rows are copies: gathering would cost more than it saves.
    """
    if torch.compiler.is_compiling() or text.is_meta or len(text) < 2:
        return None, None
    flat = text.flatten(1)
    weights = torch.linspace(0.5, 1.5, flat.shape[1], device=flat.device)
    sums = (flat.float() * weights).sum(1)
    if mask is not None:
        sums = sums + mask.float() @ weights[: mask.shape[1]]
    _, rows = torch.unique(sums, return_inverse=True)
    count = int(rows.max()) + 1
    if 2 * count > len(rows):
        return None, None
    order = torch.arange(len(rows), device=rows.device)
    first = order.new_full((count,), len(rows)).scatter_reduce_(0, rows, order, "amin")
    same = torch.equal(flat[first][rows], flat) and (mask is None or torch.equal(mask[first][rows], mask))
    return (first, rows) if same else (None, None)


def project_keys_values(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``(B, H, T, d/H)`` of ``x (B, T, d)`` by the weights of a ``MultiheadAttention``."""
    d = layer.embed_dim
    keys, values = F.linear(x, layer.in_proj_weight[d:], layer.in_proj_bias[d:]).chunk(2, -1)
    return split_heads(keys, layer.num_heads), split_heads(values, layer.num_heads)


def attend(
    layer: Any,  # nn.MultiheadAttention, which ModuleList does not tell
    x: torch.Tensor,
    keys_values: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of ``x (B, T, d)`` to projected keys and values, with the layer's own weights."""
    d = layer.embed_dim
    query = split_heads(F.linear(x, layer.in_proj_weight[:d], layer.in_proj_bias[:d]), layer.num_heads)
    dropout = layer.dropout if layer.training else 0.0
    mixed = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    return layer.out_proj(mixed.transpose(1, 2).flatten(2))


class Whitening(nn.Module):
    """Decorrelates tokens: ``(t - mean) · (Σ + ridge·I)^(-1/2)``, with statistics of training prompts.

    Autocast does not apply: the directions that it magnifies would be those that rounding has changed.

    Text encoders spend nearly all their variance on a few directions, and so do untrained text layers. Prompts whose
    order of words decides what to draw ("left of" and "right of") differ in the others, which would otherwise hardly
    reach the policy. The statistics are buffers and thus part of every checkpoint; until they are fitted, the layer
    changes nothing.

    Args:
        width: Text width ``D``.
        ridge: Added to the eigenvalues of the covariance, as a share of their mean.
    """

    mean: torch.Tensor
    transform: torch.Tensor
    fitted: torch.Tensor

    def __init__(self, width: int, ridge: float = 0.01):
        super().__init__()
        self.ridge = ridge
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("transform", torch.eye(width))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, tokens: torch.Tensor) -> None:
        """Measures the statistics.

        Args:
            tokens: ``(M, D)`` embeddings of the tokens of training prompts, without padding.

        Raises:
            ValueError: If there are fewer than two tokens, or all are equal.
        """
        tokens = tokens.double()
        if len(tokens) < 2 or not tokens.var(0).sum() > 0:
            raise ValueError(f"text statistics need at least two different tokens, got {tuple(tokens.shape)}")
        values, vectors = torch.linalg.eigh(torch.cov(tokens.T))
        scale = (values.clamp(min=0) + self.ridge * values.mean()).rsqrt()
        self.mean.copy_(tokens.mean(0))
        self.transform.copy_(vectors * scale @ vectors.T)
        self.fitted.fill_(True)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """``(…, D)`` → ``(…, D)``."""
        with autocast(text.device, False):
            return (text.to(self.mean.dtype) - self.mean) @ self.transform


class TokenEmbedding(nn.Module):
    """Token ids as vectors: a learned table plus learned positions.

    Args:
        vocabulary: Number of tokens.
        length: The longest prompt in tokens.
        width: Width ``d``.

    Raises:
        ValueError: If a size is not set.
    """

    def __init__(self, vocabulary: int, length: int, width: int):
        super().__init__()
        if min(vocabulary, length) < 1:
            raise ValueError("text_encoder='tokens' needs text_vocabulary and text_length: see PromptReader.sizes")
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``(B, L)`` → ``(B, L, d)``."""
        return self.words(ids) + self.positions[: ids.shape[1]]


class TextLayer(nn.Module):
    """Pre-norm self-attention over the text and a feed-forward layer; every token sees all others.

    Args:
        width: Width ``d``.
        hidden: Hidden width of the feed-forward layer.
        n_heads: Attention heads.
        dropout: Dropout probability, active in train mode only.
    """

    def __init__(self, width: int, hidden: int, n_heads: int, dropout: float):
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, n_heads, dropout, batch_first=True)
        self.feed_forward = feed_forward(width, hidden, dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """``(B, L, d)`` → ``(B, L, d)``; ``mask`` ``(B, 1, 1, L)`` is true where a token counts."""
        normed = self.attention_norm(x)
        x = x + attend(self.attention, normed, project_keys_values(self.attention, normed), mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


def feed_forward(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Two linear layers with a GELU between them."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
    )


def prediction_head(width: int, out: int, blocks: int) -> nn.Sequential:
    """Two linear layers, or ``blocks`` pairs of them and one more (the authors' ablation)."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)]
    if not blocks:
        layers = [nn.Linear(width, 2 * width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width if blocks else 2 * width, out))
