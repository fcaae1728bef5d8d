"""PickScore v1: which of two images people prefer.

Source: Kirstain et al. 2023 (arXiv 2305.01569), weights ``yuvalkirstain/PickScore_v1`` (a CLIP ViT-H/14, MIT licence).
Range: ``exp(logit_scale) · cos(text, image)``, in practice 16 to 26; the probability that an image is preferred to
another of the same prompt is the sigmoid of the score difference.
Preprocessing: ``CLIPImageProcessor`` of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, 224 px, 77 tokens.
"""

from __future__ import annotations

from noisear_rl.rewards.clip import CLIPH


class PickScore(CLIPH):
    """PickScore v1; see the module docstring and :class:`~noisear_rl.rewards.pretrained.PretrainedReward`."""

    name = "pickscore"
    source = "yuvalkirstain/PickScore_v1/model.safetensors"
    how = "Pass weights=FOLDER with model.safetensors of yuvalkirstain/PickScore_v1."
