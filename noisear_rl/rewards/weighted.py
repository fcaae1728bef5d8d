"""A weighted sum of scorers: the form of the paper's reward (NoiseAR, appendix D).

Shapes: ``B`` images ``(B, 3, H, W)`` in [0, 1], scores ``(B,)`` float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self, get_args, runtime_checkable

import torch

from noisear_rl.distributed import gather_rows
from noisear_rl.patches import per_row

Normalization = Literal["none", "running", "fixed"]


@runtime_checkable
class Reward(Protocol):
    """A scorer: higher is better. Its class documents source, range and licence.

    Attributes:
        name: Name in records and logs.
    """

    name: str

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores ``(B, 3, H, W)`` images in [0, 1] against their prompts: ``(B,)`` float32."""
        ...


def checked_scores(found: Any, count: int, who: str) -> torch.Tensor:
    """What a scorer returned, as float32.

    Args:
        found: Any object.
        count: ``B``.
        who: The scorer, or its file, for the message.

    Raises:
        ValueError: If it is no tensor of ``B`` real numbers.
    """
    if not isinstance(found, torch.Tensor) or found.is_complex():
        kind = f"{found.dtype} numbers" if isinstance(found, torch.Tensor) else f"{found!r:.60}"
        raise ValueError(f"{who} returned {kind}, expected a tensor ({count},) of real numbers")
    if found.shape != (count,):
        raise ValueError(f"{who} returned scores {tuple(found.shape)}, expected ({count},): one number per image")
    return found.float()


class WeightedReward:
    """``R = Σ_k w_k · z_k``, where ``z_k`` is the score of a scorer, optionally standardised.

    ``copy.deepcopy`` returns the same object, so that environments made with it share its scorers and their statistics.

    Args:
        rewards: Scorers and their weights.
        normalize: ``none``: scores as they are. ``fixed``: standardised by fixed means and standard deviations on
            Gaussian noise, so that weights are in units of standard deviations. ``running``: standardised by the
            statistics of all scores so far, which depend on what was scored before; checkpoints store them.
        statistics: Mean and standard deviation by scorer name, for ``fixed``
            (:mod:`noisear_rl.evaluation.reward_statistics` measures them); the default is the scorer's own
            ``statistics``.

    Raises:
        ValueError: If there is no scorer, two scorers share a name, a weight is not finite, ``normalize`` is unknown,
            or ``fixed`` lacks the statistics of a scorer.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[Reward, float]],
        normalize: Normalization = "none",
        statistics: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        names = [reward.name for reward, _ in rewards]
        if not rewards or len(set(names)) != len(names):
            raise ValueError(f"expected at least one scorer and unique names, got {names}")
        if not all(math.isfinite(weight) for _, weight in rewards):
            raise ValueError("reward weights must be finite")
        if normalize not in get_args(Normalization):
            raise ValueError(f"unknown normalize {normalize!r}; expected one of {get_args(Normalization)}")
        self.rewards, self.normalize = list(rewards), normalize
        self.name = "+".join(names)
        self.statistics: dict[str, tuple[float, float]] = {}
        if normalize == "fixed":
            self.statistics = {reward.name: _fixed(reward, statistics or {}) for reward, _ in rewards}
        self.moments = {name: [0.0, 0.0, 0.0] for name in names}  # count, mean, sum of squared deviations

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Asks the scorers that read only some prompts (those of the shapes world) whether they read these.

        Raises:
            ValueError: If one does not; names the prompt and the nearest one that it reads.
        """
        for reward, _ in self.rewards:
            if check := getattr(reward, "check_prompts", None):
                check(prompts)

    def components(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The score of every scorer, ``(B,)`` each, not standardised, where the images are; NaN where a scorer fails.

        Scorers do not see images that hold NaN or infinity: these get black ones in their place, and the score NaN.
        A scorer with a true attribute ``takes_frames`` gets videos ``(B, T, 3, H, W)``; others score each frame, and
        the score is the mean.

        Raises:
            ValueError: If images and prompts do not match, or a scorer does not return one number per image.
        """
        if images.dim() not in (4, 5) or images.shape[-3] != 3 or len(images) != len(prompts):
            raise ValueError(f"expected images ({len(prompts)}, 3, H, W), got {tuple(images.shape)}")
        whole = images.detach().flatten(1).isfinite().all(1)  # (B,)
        seen = images if whole.all() else torch.where(per_row(whole, images), images, 0.0)
        scores = {}
        for reward, _ in self.rewards:
            if seen.dim() == 4 or getattr(reward, "takes_frames", False):
                scored = reward.score(seen, prompts)
            else:
                each = [prompt for prompt in prompts for _ in range(seen.shape[1])]
                scored = checked_scores(reward.score(seen.flatten(0, 1), each), len(each), f"scorer {reward.name!r}")
                scored = scored.unflatten(0, (-1, seen.shape[1])).mean(1)
            values = checked_scores(scored, len(prompts), f"scorer {reward.name!r}")
            scores[reward.name] = torch.where(whole, values.to(whole.device), torch.nan)
        return scores

    def total(self, components: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum ``(B,)`` of the scores from :meth:`components`; NaN where one of them is not finite.

        Algorithms drop and count such episodes. With ``running``, the scores first update the statistics.
        """
        total = torch.zeros_like(next(iter(components.values())))
        for reward, weight in self.rewards:
            values = components[reward.name]
            if self.normalize == "running":
                self._observe(reward.name, values.detach())
            mean, std = self._statistics(reward.name)
            total = total + weight * (values - mean) / std
        return torch.where(total.isfinite(), total, torch.nan)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The weighted sum ``(B,)``."""
        return self.total(self.components(images, prompts))

    def _observe(self, name: str, values: torch.Tensor) -> None:
        """Adds the scores of all processes to the running moments (Chan et al. 1979)."""
        values = gather_rows(values)
        values = values[values.isfinite()].double()
        if not len(values):
            return
        count, mean, squares = self.moments[name]
        total, shift = count + len(values), values.mean().item() - mean
        squares += (values - values.mean()).square().sum().item() + shift**2 * count * len(values) / total
        self.moments[name] = [total, mean + shift * len(values) / total, squares]

    def _statistics(self, name: str) -> tuple[float, float]:
        if self.normalize == "fixed":
            return self.statistics[name]
        count, mean, squares = self.moments[name]
        if self.normalize == "none" or count < 2 or squares <= 0:
            return 0.0 if self.normalize == "none" else mean, 1.0
        return mean, math.sqrt(squares / (count - 1))

    def state_dict(self) -> dict[str, Any]:
        """The running moments, for checkpoints."""
        return {"moments": {name: list(values) for name, values in self.moments.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            ValueError: If the state belongs to other scorers.
        """
        if state["moments"].keys() != self.moments.keys():
            raise ValueError(f"the checkpoint's scorers are {sorted(state['moments'])}, not {sorted(self.moments)}")
        self.moments = {name: list(values) for name, values in state["moments"].items()}


def _fixed(reward: Reward, statistics: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    found = statistics.get(reward.name, getattr(reward, "statistics", None))
    if found is None:
        raise ValueError(
            f"normalize 'fixed' needs the statistics of {reward.name!r}: measure them with "
            "`noisear reward-statistics`, or set normalize to 'running' or 'none'"
        )
    mean, std = (float(value) for value in found)
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"statistics of {reward.name!r} must be a mean and a positive standard deviation, got {found}")
    return mean, std
