"""A value function over prefixes, for per-patch credit.

Shapes: ``B`` batch, ``N`` patches, ``A`` elements per patch, ``L`` text tokens, ``D`` text width.
"""

from __future__ import annotations

import torch
from torch import nn

from noisear_rl.policy.config import NoiseARConfig
from noisear_rl.policy.model import NoiseARPolicy


class NoiseARCritic(nn.Module):
    """``V(x_<i, text)``: the policy's kind of network with its own weights and one number per patch.

    It shares nothing with a policy, so its loss gives the policy no gradient. An untrained critic is 0 everywhere.

    Args:
        config: Sizes of the network, usually the policy's.
    """

    def __init__(self, config: NoiseARConfig):
        super().__init__()
        self.policy = NoiseARPolicy(config)
        for name, _ in list(self.policy.network.named_children()):
            if name.startswith("prediction_head"):
                delattr(self.policy.network, name)  # only features are needed
        self.value = nn.Linear(config.d_model, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, patches: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Values before each patch, ``(B, N)``: column ``i`` sees the text and ``i`` patches."""
        return self.value(self.policy.features(patches, text, text_mask))[..., 0]
