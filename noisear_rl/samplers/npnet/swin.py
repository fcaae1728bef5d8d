"""Swin transformer (Liu et al. 2021, arXiv 2103.14030) without its classifier, as NPNet uses it.

Module names match timm's ``swin_*`` models from version 0.9 on, so that their state dicts load. There is no stochastic
depth.

Shapes: ``B`` images, ``G`` side of a grid of tokens, ``d`` token width, ``H`` heads, ``n`` windows per grid,
``T`` tokens per window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Self-attention; within a window of a grid, with a learned bias per relative position.

    Args:
        width: ``d``.
        n_heads: ``H``.
        window: Side of the window; ``None`` for tokens without a position.
    """

    def __init__(self, width: int, n_heads: int, window: int | None = None):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width, bias=window is not None)
        self.proj = nn.Linear(width, width)
        self.has_place = window is not None
        if window is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, n_heads))
            row, column = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
            down, right = (axis[:, None] - axis + window - 1 for axis in (row, column))  # (T, T), from 0
            self.relative_position: torch.Tensor
            self.register_buffer("relative_position", (2 * window - 1) * down + right, persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Maps ``(B, T, d)`` to the same shape, or ``(B·n, T, d)`` with a mask ``(n, T, T)`` added per window."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, d/H)
        bias = None
        if self.has_place:
            bias = self.relative_position_bias_table[self.relative_position].permute(2, 0, 1)  # (H, T, T)
            if mask is not None:
                bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class SwinBlock(nn.Module):
    """Attention within windows of a grid, shifted by half a window in every other block, then a feed-forward layer."""

    def __init__(self, width: int, n_heads: int, grid: int, window: int, shifted: bool):
        super().__init__()
        self.window = min(window, grid)
        self.shift = window // 2 if shifted and grid > window else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, n_heads, self.window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        mask = None
        if self.shift:  # tokens that the shift brings together from opposite edges do not attend to each other
            place = torch.arange(grid)
            edge = (place >= grid - window).long() + (place >= grid - self.shift).long()
            region = self.partition((3 * edge[:, None] + edge)[None, ..., None])[..., 0]  # (n, T)
            mask = (region[:, None] != region[..., None]) * -100.0
        self.register_buffer("mask", mask, persistent=False)

    def partition(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, G, G, d)`` → ``(B·n, T, d)``."""
        cut = x.unflatten(1, (-1, self.window)).unflatten(3, (-1, self.window))
        return cut.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def merge(self, windows: torch.Tensor, grid: int) -> torch.Tensor:
        """``(B·n, T, d)`` → ``(B, G, G, d)``."""
        side = grid // self.window
        cut = windows.unflatten(1, (self.window, self.window)).unflatten(0, (-1, side, side))
        return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``(B, G, G, d)`` to the same shape."""
        shifted = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        mixed = self.merge(self.attn(self.partition(shifted), self.mask), x.shape[1])
        x = x + torch.roll(mixed, (self.shift, self.shift), (1, 2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class SwinStage(nn.Module):
    """Blocks on one grid; every stage but the first starts by merging 2 x 2 tokens into one of twice the width."""

    def __init__(self, width: int, depth: int, n_heads: int, grid: int, window: int, first: bool):
        super().__init__()
        self.downsample = None
        if not first:
            parts = {"norm": nn.LayerNorm(2 * width), "reduction": nn.Linear(2 * width, width, bias=False)}
            self.downsample = nn.ModuleDict(parts)
        blocks = [SwinBlock(width, n_heads, grid, window, shifted=bool(i % 2)) for i in range(depth)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 2G, 2G, d/2)``, or in the first stage ``(B, G, G, d)``, → ``(B, G, G, d)``."""
        if self.downsample is not None:
            four = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
            x = self.downsample["reduction"](self.downsample["norm"](four))
        return self.blocks(x)


class Swin(nn.Module):
    """Images ``(B, 3, S, S)`` → normalised tokens ``(B, G, G, d)`` of the last stage.

    Args:
        image_size: ``S``.
        patch_size: Side of the patches that the first stage's tokens are made of.
        window_size: Side of the attention windows in tokens; a smaller grid is one window.
        d_model: ``d`` of the first stage; every later stage has twice the width on half the grid.
        depths: Blocks per stage.
        n_heads: Attention heads per stage.

    Raises:
        ValueError: If the sizes do not fit together.

    Attributes:
        grids: ``G`` of each stage.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        window_size: int,
        d_model: int,
        depths: Sequence[int],
        n_heads: Sequence[int],
    ):
        super().__init__()
        stages = len(depths)
        if not stages or len(n_heads) != stages:
            raise ValueError(f"depths {tuple(depths)} and n_heads {tuple(n_heads)} must have one number per stage")
        if image_size % (patch_size * 2 ** (stages - 1)):
            raise ValueError(f"an image of {image_size} does not halve {stages - 1} times into patches of {patch_size}")
        self.grids = [image_size // patch_size // 2**i for i in range(stages)]
        widths = [d_model * 2**i for i in range(stages)]
        for grid, width, heads in zip(self.grids, widths, n_heads, strict=True):
            if grid > window_size and grid % window_size:
                raise ValueError(f"windows of {window_size} do not tile a grid of {grid} tokens")
            if width % heads:
                raise ValueError(f"{heads} attention heads do not divide a width of {width}")
        projection = nn.Conv2d(3, d_model, patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": projection, "norm": nn.LayerNorm(d_model)})
        self.layers = nn.Sequential(
            *(
                SwinStage(widths[i], depths[i], n_heads[i], self.grids[i], window_size, first=i == 0)
                for i in range(stages)
            )
        )
        self.norm = nn.LayerNorm(widths[-1])
        for name, parameter in self.layers.named_parameters():
            if parameter.dim() == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        tokens = self.patch_embed["proj"](x).permute(0, 2, 3, 1)
        return self.norm(self.layers(self.patch_embed["norm"](tokens)))


def swin_sizes(state: Mapping[str, torch.Tensor], prefix: str, last_grid: int) -> dict[str, Any]:
    """Infers the arguments of :class:`Swin` from a state dict.

    Args:
        state: Tensors by name.
        prefix: Prefix of their names.
        last_grid: ``G`` of the last stage, which a state dict does not contain.

    Raises:
        KeyError: If a tensor is missing.
        IndexError: If a tensor has too few axes.
    """
    stage_of = lambda key: key.removeprefix(f"{prefix}layers.").split(".")[0]
    stages = [stage_of(key) for key in state if key.startswith(prefix) and key.endswith("norm1.weight")]
    count = len(set(stages))
    projection = state[f"{prefix}patch_embed.proj.weight"].shape
    tables = [state[f"{prefix}layers.{i}.blocks.0.attn.relative_position_bias_table"].shape for i in range(count)]
    if not tables:
        raise KeyError(f"{prefix}layers")
    return {
        "image_size": last_grid * 2 ** (count - 1) * projection[2],
        "patch_size": projection[2],
        "window_size": (isqrt(tables[0][0]) + 1) // 2,
        "d_model": projection[0],
        "depths": tuple(stages.count(str(i)) for i in range(count)),
        "n_heads": tuple(table[1] for table in tables),
    }
