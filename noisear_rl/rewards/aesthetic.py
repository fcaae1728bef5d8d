"""LAION's aesthetic predictors: how much people like an image, independent of the prompt.

Both read the normalised image embedding of CLIP ViT-L/14. Version 1 is one linear layer
(``LAION-AI/aesthetic-predictor``, MIT licence); version 2 is five linear layers without activations in between, trained
on SAC, LOGOS and AVA ratings (``christophschuhmann/improved-aesthetic-predictor``, Apache-2.0).
Range: mean ratings, about 1 to 10; 5 to 7 for images from diffusion models.
Preprocessing: OpenAI's CLIP, by torchvision on PIL, 224 px.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from noisear_rl.rewards.clip import CLIPReward, CLIPScore
from noisear_rl.rewards.preprocess import Preprocess
from noisear_rl.rewards.weights import find_weights, load_weights, read_state_dict


def linear_head(width: int) -> torch.nn.Module:
    """The head of version 1."""
    return torch.nn.Linear(width, 1)


def mlp_head(width: int) -> torch.nn.Module:
    """The head of version 2, with the names of its published weights, which count the dropouts as layers."""
    head = torch.nn.Module()
    sizes = (width, 1024, 128, 64, 16, 1)
    linear = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    drop = torch.nn.Identity()
    head.layers = torch.nn.Sequential(linear[0], drop, linear[1], drop, linear[2], drop, linear[3], linear[4])
    head.forward = head.layers.forward
    return head


class Aesthetic(CLIPReward):
    """Base class of the aesthetic predictors; see the module docstring.

    Args:
        head: File with the published weights of the head; ``None`` to download them.
        weights: CLIP's weights, as for :class:`~noisear_rl.rewards.clip.CLIPScore`.
        **options: See :class:`~noisear_rl.rewards.pretrained.PretrainedReward`.
    """

    source, how = CLIPScore.source, CLIPScore.how
    preprocessing = Preprocess("torchvision")
    head_source = ""
    make_head = staticmethod(linear_head)

    def __init__(self, weights: str | Path | None = None, *, head: str | Path | None = None, **options: Any) -> None:
        super().__init__(weights, **options)
        self.head_weights = head
        self.head: Any = None

    def load(self) -> None:
        """See the base class."""
        super().load()
        with self._lock:
            if self.head is None:
                state = read_state_dict(find_weights(self.head_weights, self.head_source, "Pass head=FILE."))
                with torch.device("meta"):
                    head = self.make_head(self.architecture["projection_dim"])
                load_weights(head, state, f"the head of {self.name}")
                self.head = head.to(self.device).eval().requires_grad_(False)  # tiny: float32 always

    def text(self, prompts: Any) -> tuple[torch.Tensor, ...]:
        """Returns nothing: the prompt does not matter."""
        return ()

    def compare(self, pixels: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return self.head(self.image_features(pixels).float())[:, 0]


class AestheticV1(Aesthetic):
    """The linear predictor on CLIP ViT-L/14."""

    name = "aesthetic-v1"
    head_source = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"


class AestheticV2(Aesthetic):
    """The predictor with five linear layers, ``sac+logos+ava1-l14-linearMSE``."""

    name = "aesthetic-v2"
    make_head = staticmethod(mlp_head)
    head_source = (
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth"
    )
