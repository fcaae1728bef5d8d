"""Rewards: images and prompts in, one number an image out; higher is better.

Shapes: images ``(B, 3, H, W)`` in [0, 1], scores ``(B,)`` float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

__all__ = ["REWARDS", "Reward", "WeightedReward", "load_reward"]


@runtime_checkable
class Reward(Protocol):
    """A scorer.

    Attributes:
        name: What records and logs call it.
        statistics: Mean and standard deviation over Gaussian noise on the default denoiser, for normalisation.
    """

    name: str
    statistics: tuple[float, float]

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores ``(B, 3, H, W)`` images in [0, 1] against their prompts: ``(B,)`` float32."""
        ...


def _from(module: str, name: str) -> Callable[[], Reward]:
    """A scorer whose module is imported when it is asked for; some load transformers."""
    return lambda: getattr(importlib.import_module(f"noisear_rl.rewards.{module}"), name)()


REWARDS: dict[str, Callable[[], Reward]] = {
    "shapes-match": _from("shapes", "ShapesMatch"),
    "shapes-clip": _from("shapes", "ShapesClip"),
    "shapes-exact": _from("shapes", "ShapesExact"),
    "brightness": _from("simple", "Brightness"),
    "jpeg-compressibility": _from("simple", "JpegCompressibility"),
}


class WeightedReward:
    """A weighted sum of scorers: the paper's reward is of this form (NoiseAR, appendix D).

    Args:
        rewards: Scorers and their weights.
        normalize: Standardise every scorer by its ``statistics`` first, so that weights are comparable.

    Raises:
        ValueError: If there is no scorer, two have one name, or a weight is not finite.
    """

    def __init__(self, rewards: Sequence[tuple[Reward, float]], normalize: bool = False):
        names = [reward.name for reward, _ in rewards]
        if not rewards or len(set(names)) != len(names):
            raise ValueError(f"expected at least one scorer and no name twice, got {names}")
        if not all(torch.isfinite(torch.tensor(float(weight))) for _, weight in rewards):
            raise ValueError("reward weights must be finite")
        self.rewards, self.normalize = list(rewards), normalize
        self.name = "+".join(names)

    def components(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Every scorer's own score, ``(B,)`` each, not normalised.

        Raises:
            ValueError: If images and prompts do not fit together or a score is not finite.
        """
        if images.dim() != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(f"expected images ({len(prompts)}, 3, H, W), got {tuple(images.shape)}")
        scores = {reward.name: reward.score(images, prompts).float() for reward, _ in self.rewards}
        for name, values in scores.items():
            if not values.isfinite().all():
                raise ValueError(f"reward {name!r} gave NaN or infinite scores for {(~values.isfinite()).sum()} images")
        return scores

    def total(self, components: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum ``(B,)`` of what :meth:`components` returned."""
        total = torch.zeros_like(next(iter(components.values())))
        for reward, weight in self.rewards:
            mean, std = reward.statistics if self.normalize else (0.0, 1.0)
            total = total + weight * (components[reward.name] - mean) / std
        return total

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The weighted sum ``(B,)``."""
        return self.total(self.components(images, prompts))


def load_reward(spec: str | Mapping[str, float], normalize: bool = False) -> WeightedReward:
    """Builds a reward from names.

    Args:
        spec: A scorer's name, or weights by name: ``{"shapes-match": 1.0, "shapes-clip": 0.1}``.
        normalize: See :class:`WeightedReward`.

    Raises:
        ValueError: If a name is unknown.
    """
    weights = {spec: 1.0} if isinstance(spec, str) else dict(spec)
    if unknown := [name for name in weights if name not in REWARDS]:
        raise ValueError(f"unknown reward {unknown[0]!r}; expected one of {sorted(REWARDS)}")
    return WeightedReward([(REWARDS[name](), float(weight)) for name, weight in weights.items()], normalize)
