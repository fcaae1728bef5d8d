"""What a policy refuses to read or to score."""

from __future__ import annotations

import torch

from noisear_rl.policy.config import TOKENS, NoiseARConfig


def check_text(config: NoiseARConfig, text: torch.Tensor, text_mask: torch.Tensor | None) -> None:
    """Refuses text that a policy cannot read.

    Args:
        config: The policy's.
        text: ``(B, L, D)``.
        text_mask: ``(B, L)`` or ``None``.

    Raises:
        ValueError: If a shape is wrong, the text is complex or not finite, or all tokens of a row are masked.
    """
    kind = "token ids" if config.text_encoder == TOKENS else "a text embedding"
    if text.dim() != 3 or text.shape[-1] != config.text_dim or 0 < config.text_length < text.shape[1]:
        raise ValueError(
            f"expected {kind} (B, {config.text_length or 'L'}, {config.text_dim}), got {tuple(text.shape)}; "
            f"was the policy made for another denoiser? It reads text_encoder={config.text_encoder!r}"
        )
    check_numbers("text", text)
    if text_mask is None:
        return
    if text_mask.shape != text.shape[:2]:
        raise ValueError(f"expected a text mask {tuple(text.shape[:2])}, got {tuple(text_mask.shape)}")
    if not text_mask.is_meta and not text_mask.bool().any(1).all():
        raise ValueError("text_mask is false for every token of a row: a policy needs a token to read")


def check_numbers(name: str, values: torch.Tensor) -> None:
    """Refuses values that are complex or not finite. Tensors without data (``meta``), which only count FLOPs, pass.

    Raises:
        ValueError: If there are any; names them.
    """
    if values.is_complex():
        raise ValueError(f"{name} must be real numbers, not {values.dtype}")
    if not values.is_meta and not values.isfinite().all():
        raise ValueError(f"{name} hold{'' if name.endswith('s') else 's'} NaN or infinite values")
