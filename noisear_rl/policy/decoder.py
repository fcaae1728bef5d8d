"""The transformer decoder that turns a prefix of patches and the text into a Gaussian (NoiseAR §2.2).

:class:`Decoder` is what our network and the authors' (:mod:`~noisear_rl.policy.released`) have in common: token
embedding and blocks of causal self-attention, cross-attention to the text, and a feed-forward layer.
:class:`PaperDecoder` is ours.

Shapes: ``B`` batch, ``N`` patches, ``A`` elements per patch, ``T`` tokens, ``L`` text tokens, ``D`` text width,
``d`` model width, ``H`` heads.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import nn

from noisear_rl.patches import sequence_shape
from noisear_rl.policy.config import TOKENS, NoiseARConfig
from noisear_rl.policy.layers import (
    TextLayer,
    TokenEmbedding,
    Whitening,
    attend,
    autocast,
    distinct_rows,
    feed_forward,
    prediction_head,
    project_keys_values,
    sinusoidal_encoding,
)
from noisear_rl.policy.layouts import LayoutHead

KeysValues = tuple[torch.Tensor, torch.Tensor]


class Text(NamedTuple):
    """What the decoder needs of the text, computed once for all patches.

    Attributes:
        keys_values: Keys and values for the cross-attention of each block.
        mask: ``(B, 1, 1, L)``, true where a token counts.
        layout_logits: ``(B, K)``, if the policy has layouts.
    """

    keys_values: list[KeysValues]
    mask: torch.Tensor | None
    layout_logits: torch.Tensor | None


class Decoder(nn.Module):
    """Token embedding and decoder blocks. A subclass adds what encodes the text and the prediction heads.

    Attributes:
        residual_of_norm: Whether a sublayer's result is added to its normalised input instead of to the input itself.
        masks_padding: Whether padding of the text is masked.
    """

    residual_of_norm = False
    masks_padding = True
    latent_patch_encoder: nn.Module
    learnable_start_token_emb: torch.Tensor
    pos_encoding: torch.Tensor

    def add_blocks(self, config: NoiseARConfig) -> None:
        """Registers the layers of all blocks, under the names of the authors' state dict."""
        d, layers = config.d_model, range(config.n_layers)
        attention = {"num_heads": config.n_heads, "dropout": config.dropout, "batch_first": True}
        self.self_attn_layers = nn.ModuleList(nn.MultiheadAttention(d, **attention) for _ in layers)
        self.self_attn_norm = nn.ModuleList(nn.LayerNorm(d) for _ in layers)
        self.cross_attn_layers = nn.ModuleList(nn.MultiheadAttention(d, **attention) for _ in layers)
        self.cross_attn_norm = nn.ModuleList(nn.LayerNorm(d) for _ in layers)
        self.ffn_layers = nn.ModuleList(feed_forward(d, config.d_ff, config.dropout) for _ in layers)
        self.ffn_norm = nn.ModuleList(nn.LayerNorm(d) for _ in layers)
        self.layout_head = LayoutHead(config.layouts, d, config.n_heads) if config.layouts else None

    def read(self, text: torch.Tensor, text_mask: torch.Tensor | None) -> Text:
        """Encodes and projects the text ``(B, L, D)`` once for all patches; ``text_mask`` is ``(B, L)``.

        In eval mode, rows with the same text are computed once.
        """
        mask = None
        if text_mask is not None and self.masks_padding:
            mask = text_mask.bool()[:, None, None]  # (B, 1, 1, L)
        first, rows = (None, None) if self.training else distinct_rows(text, text_mask)
        read = mask if first is None or mask is None else mask[first]
        with autocast(text.device, False) if self.layout_head else contextlib.nullcontext():
            text = self.encode(text if first is None else text[first], read)  # (U, L, d), where U is B if all differ
            logits = self.layout_head(text, read) if self.layout_head else None  # rounded, they would choose another
        keys_values = [project_keys_values(layer, text) for layer in self.cross_attn_layers]
        if rows is not None:
            keys_values = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in keys_values]
            logits = None if logits is None else logits.index_select(0, rows)
        return Text(keys_values, mask, logits)

    def encode(self, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Text ``(B, L, D)`` → ``(B, L, d)``; ``mask`` is ``(B, 1, 1, L)``, true where a token counts."""
        raise NotImplementedError

    def heads(self, features: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Features ``(B, T, d)`` of the patches from ``first`` on → mean and log-variance ``(B, T, A)``."""
        raise NotImplementedError

    def tokens(self, patches: torch.Tensor, layout: torch.Tensor | None = None) -> torch.Tensor:
        """The start token and all patches but the last, ``(B, N, A)`` → ``(B, N, d)``; ``layout`` is ``(B,)``."""
        start = self.learnable_start_token_emb.expand(len(patches), 1, -1)
        past = self.latent_patch_encoder(patches[:, :-1].to(self.pos_encoding.dtype))  # (B, N-1, d)
        if layout is not None and self.layout_head:
            past = past + self.layout_head.embedding(layout)[:, None]
        return torch.cat([start, past], 1) + self.pos_encoding[:, : patches.shape[1]]

    def token(
        self, patch: torch.Tensor | None, position: int, batch: int, layout: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The token at a position, ``(B, 1, d)``: the start token, or the embedded patch ``(B, A)`` before it."""
        if patch is None:
            token = self.learnable_start_token_emb.expand(batch, 1, -1)
        else:
            token = self.latent_patch_encoder(patch.to(self.pos_encoding.dtype))[:, None]
            if layout is not None and self.layout_head:
                token = token + self.layout_head.embedding(layout)[:, None]
        return token + self.pos_encoding[:, position : position + 1]

    def forward(self, x: torch.Tensor, text: Text, cache: list[KeysValues | None] | None = None) -> torch.Tensor:
        """Tokens ``(B, T, d)`` → features ``(B, T, d)``.

        With a cache, ``x`` is the one next token and ``cache`` holds the keys and values of all before.
        """
        keys_values, mask, _ = text
        for i in range(len(self.ffn_layers)):
            normed = self.self_attn_norm[i](x)
            own = project_keys_values(self.self_attn_layers[i], normed)
            if cache is not None:
                if (past := cache[i]) is not None:
                    own = torch.cat([past[0], own[0]], 2), torch.cat([past[1], own[1]], 2)
                cache[i] = own
            update = attend(self.self_attn_layers[i], normed, own, causal=cache is None)
            x = (normed if self.residual_of_norm else x) + update
            normed = self.cross_attn_norm[i](x)
            update = attend(self.cross_attn_layers[i], normed, keys_values[i], mask)
            x = (normed if self.residual_of_norm else x) + update
            normed = self.ffn_norm[i](x)
            x = (normed if self.residual_of_norm else x) + self.ffn_layers[i](normed)
        return x


class PaperDecoder(Decoder):
    """Our network: pre-norm blocks, a final norm and one joint head; untrained it predicts N(0, I)."""

    def __init__(self, config: NoiseARConfig):
        super().__init__()
        self.kind = config.log_variance
        n, a = sequence_shape(config.latent_shape, config.patch_size)
        d = config.d_model
        self.latent_patch_encoder = nn.Linear(a, d)
        # Small at first: a step on few samples would otherwise be spent on telling their prefixes apart.
        nn.init.normal_(self.latent_patch_encoder.weight, std=0.1 / a**0.5)
        self.learnable_start_token_emb = nn.Parameter(torch.randn(d) * 0.1)
        whitened = config.text_features == "whitened"
        self.token_embedding: TokenEmbedding | None = None
        if config.text_encoder == TOKENS:
            self.token_embedding = TokenEmbedding(config.text_vocabulary, config.text_length, d)
        else:
            self.text_norm = Whitening(config.text_dim) if whitened else nn.LayerNorm(config.text_dim)
            self.dim_adapter = nn.Linear(config.text_dim, d)
        encoding = sinusoidal_encoding(n + 1, d)
        if config.positions == "learned":
            self.pos_encoding = nn.Parameter(torch.randn_like(encoding))  # nearly orthogonal positions
        else:
            self.register_buffer("pos_encoding", encoding)
        layers = range(config.text_layers)
        self.text_layers = nn.ModuleList(TextLayer(d, config.d_ff, config.n_heads, config.dropout) for _ in layers)
        self.text_final_norm: nn.Module = nn.Identity()
        if config.text_layers:
            self.text_final_norm = Whitening(d) if whitened else nn.LayerNorm(d)
        self.add_blocks(config)
        with torch.no_grad():
            for layer in self.cross_attn_layers:
                assert isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None
                layer.in_proj_weight[2 * d :] *= config.text_scale  # the values
                layer.out_proj.weight *= config.text_scale
        self.final_norm = nn.LayerNorm(d)
        self.prediction_head = prediction_head(d, 2 * a if self.kind == "predicted" else a, 0)
        if self.kind == "shared":
            self.log_variance = nn.Parameter(torch.zeros(n))

    def encode(self, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """See :meth:`Decoder.encode`: embedding and text layers."""
        if self.token_embedding is not None:
            text = self.token_embedding(text[..., 0].long())  # (B, L, d)
        else:
            text = self.dim_adapter(self.text_norm(text.to(self.pos_encoding.dtype))).to(self.pos_encoding.dtype)
        for layer in self.text_layers:
            text = layer(text, mask)
        return self.text_final_norm(text)

    def forward(self, x: torch.Tensor, text: Text, cache: list[KeysValues | None] | None = None) -> torch.Tensor:
        """See :meth:`Decoder.forward`."""
        return self.final_norm(super().forward(x, text, cache))

    def heads(self, features: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Decoder.heads`; the log-variance is predicted, one learned number per position, or 0."""
        if self.kind == "predicted":
            mean, log_variance = self.prediction_head(features).chunk(2, -1)
            return mean, log_variance
        mean = self.prediction_head(features)
        log_variance = torch.zeros_like(mean)
        if self.kind == "shared":
            log_variance = log_variance + self.log_variance[first : first + features.shape[1], None]
        return mean, log_variance
