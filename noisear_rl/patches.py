"""Latents ⇄ patch sequences: ``(B, C, *spatial)`` ⇄ ``(B, N, A)``, an exact inverse pair.

Shapes: ``B`` batch, ``C`` latent channels, ``spatial`` any number of axes (image ``H, W``; video
``T, H, W``; audio ``T``), ``p`` patch size along each of them, ``N = prod(spatial / p)`` patches in raster
order, ``A = C · prod(p)`` elements per patch, channel first. NoiseAR §2.2.1 (arXiv 2506.01337).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``(B,)`` values as ``(B, 1, …)``, to go with the rows of a tensor ``(B, …)`` of any rank, on its device."""
    return values.to(like.device).reshape(-1, *[1] * (like.dim() - 1))


def own_patch_size(patch_size: int | Sequence[int]) -> int | tuple[int, ...]:
    """A patch size as policies keep it: one size, or a tuple of one per axis."""
    return patch_size if isinstance(patch_size, int) else tuple(patch_size)


def as_frames(latent: torch.Tensor) -> torch.Tensor:
    """A latent ``(C, *spatial)`` as frames ``(T, C, h, w)``: those of a video, or a single one; a signal is a row."""
    if latent.dim() < 4:
        return latent.reshape(1, len(latent), -1, latent.shape[-1])
    return latent.flatten(1, -3).transpose(0, 1)


def patch_grid(latent_shape: Sequence[int], patch_size: int | Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How a latent is cut.

    Args:
        latent_shape: ``(C, *spatial)``.
        patch_size: One size for all spatial axes, or one per axis.

    Returns:
        The number of patches along each spatial axis, and the patch size along each.

    Raises:
        ValueError: If the sizes do not divide the latent, or are not positive.
    """
    _, *spatial = latent_shape
    sizes = (patch_size,) * len(spatial) if isinstance(patch_size, int) else tuple(patch_size)
    if not spatial or len(sizes) != len(spatial):
        raise ValueError(f"latent {tuple(latent_shape)} has {len(spatial)} spatial axes, patch size {patch_size}")
    if any(p < 1 or s % p for s, p in zip(spatial, sizes, strict=True)):
        raise ValueError(f"patch size {patch_size} does not divide the latent's spatial shape {tuple(spatial)}")
    return tuple(s // p for s, p in zip(spatial, sizes, strict=True)), sizes


def sequence_shape(latent_shape: Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, int]:
    """``(N, A)``: the number of patches of a latent ``(C, *spatial)``, and of elements per patch."""
    grid, sizes = patch_grid(latent_shape, patch_size)
    return math.prod(grid), latent_shape[0] * math.prod(sizes)


def patchify(latents: torch.Tensor, patch_size: int | Sequence[int]) -> torch.Tensor:
    """Cuts latents ``(B, C, *spatial)`` into patches ``(B, N, A)`` in raster order.

    Raises:
        ValueError: If the patch size does not divide the latent.
    """
    b, c = latents.shape[:2]
    grid, sizes = patch_grid(latents.shape[1:], patch_size)
    k = len(grid)
    split = latents.reshape(b, c, *[n for pair in zip(grid, sizes, strict=True) for n in pair])  # (B, C, g1, p1, …)
    order = [0, *range(2, 2 + 2 * k, 2), 1, *range(3, 3 + 2 * k, 2)]  # (B, g1, …, C, p1, …)
    return split.permute(order).reshape(b, math.prod(grid), c * math.prod(sizes))


def unpatchify(patches: torch.Tensor, latent_shape: Sequence[int], patch_size: int | Sequence[int]) -> torch.Tensor:
    """Joins patches ``(B, N, A)`` into latents ``(B, C, *spatial)``.

    Raises:
        ValueError: If the patches do not make up such a latent.
    """
    grid, sizes = patch_grid(latent_shape, patch_size)
    expected = sequence_shape(latent_shape, patch_size)
    if patches.dim() != 3 or tuple(patches.shape[1:]) != expected:
        raise ValueError(f"expected patches (B, {expected[0]}, {expected[1]}), got {tuple(patches.shape)}")
    k = len(grid)
    split = patches.reshape(len(patches), *grid, latent_shape[0], *sizes)  # (B, g1, …, C, p1, …)
    order = [0, 1 + k, *[axis for i in range(k) for axis in (1 + i, 2 + k + i)]]  # (B, C, g1, p1, …)
    return split.permute(order).reshape(len(patches), *latent_shape)
