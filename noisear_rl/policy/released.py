"""The authors' released network (inference code of arXiv 2506.01337), whose ``.pth`` files load exactly.

It departs from the paper: the residual adds to the *normalised* input of every sublayer, the start token is never
trained, mean and log-variance have heads of their own, padding is not masked, and noise is drawn at half the standard
deviation, which is ``temperature = 0.5`` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import nn

from noisear_rl.patches import sequence_shape
from noisear_rl.policy.config import NoiseARConfig
from noisear_rl.policy.decoder import Decoder
from noisear_rl.policy.layers import prediction_head, sinusoidal_encoding


class ReleasedDecoder(Decoder):
    """The authors' network, with the names of their state dict."""

    residual_of_norm = True
    masks_padding = False

    def __init__(self, config: NoiseARConfig):
        super().__init__()
        n, a = sequence_shape(config.latent_shape, config.patch_size)
        d = config.d_model
        self.latent_patch_encoder = nn.Sequential(nn.Linear(a, a // 2), nn.SiLU(), nn.Linear(a // 2, d))
        self.register_buffer("learnable_start_token_emb", torch.randn(d) * 0.1)
        self.dim_adapter = nn.Linear(config.text_dim, d) if config.text_dim != d else None
        self.register_buffer("pos_encoding", sinusoidal_encoding(n + 1, d))
        self.add_blocks(config)
        self.prediction_head_mu = prediction_head(d, a, config.n_prediction_head)
        self.prediction_head_logvar = prediction_head(d, a, config.n_prediction_head)

    def encode(self, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """See :meth:`Decoder.encode`."""
        text = text.to(self.pos_encoding.dtype)
        return text if self.dim_adapter is None else self.dim_adapter(text)

    def heads(self, features: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Decoder.heads`."""
        return self.prediction_head_mu(features), self.prediction_head_logvar(features)


def released_config(state: Mapping[str, Any], n_heads: int = 1) -> NoiseARConfig:
    """Infers the sizes of the authors' released network from its state dict.

    It does not show the number of heads; theirs is 1. Latents are square with four channels, as theirs are.

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
        architecture="released",
        temperature=0.5,
    )
