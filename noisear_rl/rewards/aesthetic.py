"""LAION's aesthetic predictors: how much people like an image, independent of the prompt.

Both read the normalised image embedding of CLIP ViT-L/14. Version 1 is one linear layer
(``LAION-AI/aesthetic-predictor``, MIT licence); version 2 is five linear layers without activations in between, trained
on SAC, LOGOS and AVA ratings (``christophschuhmann/improved-aesthetic-predictor``, Apache-2.0).
Range: mean ratings, about 1 to 10; 5 to 7 for images from diffusion models.
Preprocessing: OpenAI's CLIP, by torchvision on PIL, 224 px.

Version 2.5 (``discus0434/aesthetic-predictor-v2-5``, AGPL-3.0; only its published weights are read) is a head of the
same form on the normalised pooled embedding of SigLIP so400m (``google/siglip-so400m-patch14-384``, Apache-2.0), also
for illustrations. Range: 1 to 10; above 5.5 is great, says its author. Preprocessing: both sides to 384 px.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from noisear_rl.rewards.clip import CLIPReward, CLIPScore
from noisear_rl.rewards.preprocess import Preprocess
from noisear_rl.rewards.pretrained import PretrainedReward
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


def siglip_head(width: int) -> torch.nn.Module:
    """The head of version 2.5, with the names of its published weights; dropouts count as layers."""
    head = torch.nn.Module()
    sizes = (width, 1024, 128, 64, 16, 1)
    layers = [part for a, b in pairwise(sizes) for part in (torch.nn.Linear(a, b), torch.nn.Identity())]
    head.scoring_head = torch.nn.Sequential(*layers[:-1])
    head.forward = head.scoring_head.forward
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


class AestheticV25(PretrainedReward):
    """The predictor of version 2.5; see the module docstring.

    Args:
        weights: SigLIP's weights; ``None`` to download them.
        head: File with the published weights of the head; ``None`` to download them.
        **options: See :class:`~noisear_rl.rewards.pretrained.PretrainedReward`.
    """

    name = "aesthetic-v2.5"
    source = "google/siglip-so400m-patch14-384/model.safetensors"
    how = "Pass weights=FOLDER with model.safetensors of google/siglip-so400m-patch14-384."
    head_source = "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth"
    preprocessing = Preprocess("squash", 384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    architecture: ClassVar[dict[str, Any]] = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }

    def __init__(self, weights: str | Path | None = None, *, head: str | Path | None = None, **options: Any) -> None:
        super().__init__(weights, **options)
        self.head_weights = head
        self.head: Any = None

    def build(self) -> torch.nn.Module:
        """See the base class."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        return SiglipVisionModel(SiglipVisionConfig(**self.architecture))

    def convert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keeps the part for images."""
        with torch.device("meta"):
            prefixed = any(name.startswith("vision_model.") for name in self.build().state_dict())
        seen = {name: value for name, value in state.items() if name.startswith("vision_model.")}
        return seen if prefixed else {name.removeprefix("vision_model."): value for name, value in seen.items()}

    def load(self) -> None:
        """See the base class."""
        super().load()
        with self._lock:
            if self.head is None:
                state = read_state_dict(find_weights(self.head_weights, self.head_source, "Pass head=FILE."))
                with torch.device("meta"):
                    head = siglip_head(self.architecture["hidden_size"])
                load_weights(head, {name: value.float() for name, value in state.items()}, f"the head of {self.name}")
                self.head = head.to(self.device).eval().requires_grad_(False)  # tiny: float32 always

    def text(self, prompts: Any) -> tuple[torch.Tensor, ...]:
        """Returns nothing: the prompt does not matter."""
        return ()

    def encode_text(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns nothing: the prompt does not matter."""
        return ()

    def compare(self, pixels: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return self.head(F.normalize(self.network(pixels).pooler_output.float(), dim=-1))[:, 0]
