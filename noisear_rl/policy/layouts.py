"""Several modes in one autoregressive policy: the first patch of the noise chooses between layouts.

A Gaussian per patch has one mode, and a policy that is to know several good layouts of a prompt would blur them. Here
the first patch decides for all others. Its projections on ``K`` fixed orthogonal directions are independent standard
normal numbers, which two distribution functions turn into Gumbel noise; the largest sum of noise and logit wins (the
Gumbel-max trick), so that layout ``k`` is chosen with probability ``softmax(logits)[k]``. The choice is a function of
the first patch and the text, so that the policy's density stays a product of Gaussians, each given the patches before
it: nothing that scores or trains it has to know, and the choice adds nothing to the KL divergence from N(0, I).

Shapes: ``B`` batch, ``K`` layouts, ``A`` elements per patch, ``L`` text tokens, ``d`` width.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

from noisear_rl.policy.layers import attend, project_keys_values


@functools.cache
def layout_codes(count: int, patch_dim: int) -> torch.Tensor:
    """Fixed orthogonal unit vectors ``(K, A)``, the same for every policy of these sizes."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((patch_dim, count)))
    return torch.from_numpy(basis.T.copy())


def choose_layout(first: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The layout that each first patch chooses: ``(B,)`` int64, without gradients.

    Args:
        first: ``(B, A)``.
        logits: ``(B, K)``.
    """
    with torch.no_grad():
        codes = layout_codes(logits.shape[1], first.shape[1]).to(first.device)
        normal = first.double() @ codes.T
        gumbel = -torch.log(-torch.special.log_ndtr(normal))
        return (gumbel + logits).argmax(1)


class LayoutHead(nn.Module):
    """Logits of the layouts by a learned query that attends to the text; untrained, all layouts are equally likely.

    Args:
        count: Layouts ``K``.
        width: Width ``d``.
        n_heads: Attention heads.

    Attributes:
        embedding: What a layout adds to the tokens of all patches.
    """

    def __init__(self, count: int, width: int, n_heads: int):
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, count)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Encoded text ``(B, L, d)`` → logits ``(B, K)``; ``mask`` ``(B, 1, 1, L)`` is true where a token counts."""
        query = self.query.expand(len(text), -1, -1)
        attended = attend(self.attention, query, project_keys_values(self.attention, text), mask)
        return self.logits(self.norm(attended[:, 0]))
