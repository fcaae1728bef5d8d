"""Scorers of the shapes world.

Shapes: ``B`` images, ``M`` candidates per image, ``K`` objects per caption.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from noisear_rl.denoisers.placement import resolve_device
from noisear_rl.denoisers.shapes import ASSETS
from noisear_rl.denoisers.shapes.captions import MAX_OBJECTS, SIZES, CaptionTensors, parse_caption
from noisear_rl.denoisers.shapes.detectors import MAX_DETECTIONS, CenterDetector, load_detector
from noisear_rl.denoisers.shapes.world import LARGE_ABOVE, SMALL_BELOW, Scenes, matches, relation_margin

SIZE_SOFTNESS = 0.4  # pixels by which a radius must pass the border for 73 % of the credit


def _check_captions(prompts: Sequence[str]) -> None:
    """Raises ``ValueError`` if a prompt is not a caption of the shapes world; names the nearest one."""
    for prompt in prompts:
        parse_caption(prompt)


class ShapesMatch:
    """How well an image matches its caption according to the training detector; dense, and smooth where possible.

    ``0.6 · objects · relation - 0.2 · extra + 0.4 · exact``, where *objects* is the mean of
    confidence × P(shape) × P(colour) × fit of the size over the requested objects under the best assignment,
    *relation* is ``(1 + margin) / 2`` with GenEval's margin (1 if the caption states no relation), *extra* is the
    summed confidence of unassigned objects, at most 2, and *exact* is 1 if the detected scene is exactly right.
    Range [-0.4, 1]; 1 is a perfect image.

    Args:
        device: Device of the detector; ``None`` for the accelerator if there is one. Scores are where the images are.
    """

    name = "shapes-match"
    statistics = (0.70, 0.32)

    def __init__(self, device: str | None = None) -> None:
        self.device = resolve_device(device or "auto")
        detector = load_detector(ASSETS / "train_detector").to(self.device)
        assert isinstance(detector, CenterDetector)
        self.detector = detector
        orders = itertools.permutations(range(MAX_DETECTIONS), MAX_OBJECTS)
        self.assignments = torch.tensor(list(orders), device=self.device)  # (P, K)

    check_prompts = staticmethod(_check_captions)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores ``(B, 3, 64, 64)`` images: ``(B,)`` in [-0.4, 1]. Differentiable except for *exact*.

        Raises:
            ValueError: If a prompt is not a caption of the shapes world.
        """
        captions = CaptionTensors.from_captions([parse_caption(prompt) for prompt in prompts], self.device)
        found = self.detector.candidates(images.to(self.device))
        right = matches(self.detector.decide(found), captions).diagonal().float()
        wanted = captions.shape >= 0  # (B, K)
        by_shape = found.shape.gather(2, captions.shape.clamp(min=0)[:, None].expand(-1, MAX_DETECTIONS, -1))
        by_color = found.color.gather(2, captions.color.clamp(min=0)[:, None].expand(-1, MAX_DETECTIONS, -1))
        by_color = torch.where(captions.color[:, None] >= 0, by_color, 1.0)
        radius = found.radius[..., None]  # (B, M, 1)
        beyond = torch.where(captions.size[:, None] == SIZES.index("small"), SMALL_BELOW - radius, radius - LARGE_ABOVE)
        by_size = torch.where(captions.size[:, None] >= 0, torch.sigmoid(beyond / SIZE_SOFTNESS), 1.0)
        fit = found.confidence[..., None] * by_shape * by_color * by_size * wanted[:, None]  # (B, M, K)
        slots = torch.arange(MAX_OBJECTS, device=self.device)
        objects = fit[:, self.assignments, slots].sum(-1) / wanted.sum(-1, keepdim=True)  # (B, P)
        first, second = found.center[:, self.assignments[:, 0]], found.center[:, self.assignments[:, 1]]
        diameter = 2 * found.radius[:, self.assignments]  # (B, P, K)
        margin = relation_margin(first, second, diameter[..., 0] + diameter[..., 1])  # (B, P, 4)
        chosen = captions.relation.clamp(min=0)[:, None, None].expand(-1, margin.shape[1], 1)
        relation = torch.where(captions.relation[:, None] >= 0, (1 + margin.gather(2, chosen)[..., 0]) / 2, 1.0)
        best = (objects * relation).amax(1)
        extra = found.confidence.sum(1) - found.confidence.topk(MAX_OBJECTS, 1).values.mul(wanted).sum(1)
        return (0.6 * best - 0.2 * extra.clamp(0, 2) + 0.4 * right).to(images.device)


class ShapesClip:
    """``exp(logit_scale) · cos(text, image)`` of the embedded CLIP, analogous to PickScore.

    About 0 to 22 on generated images; compare scores within a prompt, not across prompts.

    Args:
        device: See :class:`ShapesMatch`.
    """

    name = "shapes-clip"
    statistics = (15.1, 2.7)

    def __init__(self, device: str | None = None) -> None:
        from transformers import CLIPTokenizer  # these take seconds to load

        from noisear_rl.denoisers.shapes.architecture import TEXT_TOKENS, load_clip

        self.device = resolve_device(device or "auto")
        self.clip = load_clip().to(self.device)
        self.text_tokens = TEXT_TOKENS
        self.tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "pipeline" / "tokenizer")
        self._text: dict[str, torch.Tensor] = {}

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors ``(B, 128)`` of images."""
        pixels = (images.to(self.device) - 0.5) / 0.5
        return F.normalize(self.clip.get_image_features(pixels).pooler_output, dim=-1)

    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit vectors ``(B, 128)`` of prompts; each prompt is computed once."""
        for prompt in prompts:
            if prompt not in self._text:
                ids = self.tokenizer(
                    prompt, padding="max_length", max_length=self.text_tokens, truncation=True, return_tensors="pt"
                ).input_ids.to(self.device)
                self._text[prompt] = F.normalize(self.clip.get_text_features(ids).pooler_output, dim=-1)[0]
        return torch.stack([self._text[prompt] for prompt in prompts])

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores ``(B, 3, 64, 64)`` images: ``(B,)``."""
        cosine = (self.embed(images) * self.text_features(prompts)).sum(-1)
        return (self.clip.logit_scale.exp() * cosine).to(images.device)


class ShapesExact:
    """1 if the held-out detector finds exactly what the caption says, otherwise 0. For evaluation only.

    Args:
        device: See :class:`ShapesMatch`.
    """

    name = "shapes-exact"
    statistics = (0.68, 0.47)

    def __init__(self, device: str | None = None) -> None:
        self.device = resolve_device(device or "auto")
        self.detector = load_detector(ASSETS / "held_out_detector").to(self.device)

    check_prompts = staticmethod(_check_captions)

    def detect(self, images: torch.Tensor) -> Scenes:
        """What the judge finds in ``(B, 3, 64, 64)`` images."""
        return self.detector.detect(images.to(self.device))

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores ``(B, 3, 64, 64)`` images: ``(B,)``, 0 or 1."""
        captions = CaptionTensors.from_captions([parse_caption(prompt) for prompt in prompts], self.device)
        return matches(self.detect(images), captions).diagonal().float().to(images.device)
