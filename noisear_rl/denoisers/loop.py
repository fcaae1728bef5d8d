"""Ways to look into the loop of a diffusers pipeline from outside, and to change what it returns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch


class ProbeScheduler:
    """A scheduler that takes no step and records the guided prediction.

    A pipeline that runs with it evaluates its network once, with all the conditions that its class adds (sizes, rotary
    embeddings, styles) and without learned variances, so that none of this is duplicated here.

    Args:
        config: Configuration of the scheduler that it replaces.
        timestep: Timestep to evaluate.

    Attributes:
        prediction: The guided prediction, in the form of the latents.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], timestep: float) -> None:
        self.config, self.timesteps = config, torch.tensor([timestep])
        self.sigmas = self.timesteps / config["num_train_timesteps"]
        self.prediction = torch.empty(0)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **kwargs: Any
    ) -> None:
        """Keeps the single timestep."""
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Does nothing: there is only one."""

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Returns the input unchanged."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor]:
        """Records the prediction."""
        self.prediction = model_output
        return (sample,)


@contextlib.contextmanager
def _replaced(pipeline: Any, **parts: Any) -> Iterator[None]:
    """Runs a pipeline with other parts, without changing its configuration."""
    own = {name: getattr(pipeline, name) for name in parts if hasattr(pipeline, name)}
    for name in own:
        object.__setattr__(pipeline, name, parts[name])
    try:
        yield
    finally:
        for name, part in own.items():
            object.__setattr__(pipeline, name, part)


def scheduled_by(pipeline: Any, scheduler: Any) -> contextlib.AbstractContextManager[None]:
    """Runs a pipeline with another scheduler, without changing the pipeline's configuration."""
    return _replaced(pipeline, scheduler=scheduler)


@contextlib.contextmanager
def last_latents(scheduler: Any) -> Iterator[list[torch.Tensor]]:
    """Records the latents of a scheduler's last step, as not all pipelines have a callback."""
    own, found = scheduler.step, [torch.empty(0)]

    @functools.wraps(own)  # pipelines read the signature
    def step(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        found[0] = output[0]
        return output

    scheduler.step = step
    try:
        yield found
    finally:
        del scheduler.step


def unclamped(pipeline: Any) -> contextlib.AbstractContextManager[None]:
    """Lets a pipeline return what its decoder gives, in [0, 1] up to overshoots, and differentiable."""
    processor = _Unclamped()
    return _replaced(pipeline, image_processor=processor, video_processor=processor, safety_checker=None)


class _Unclamped:
    """In place of an image or video processor."""

    def postprocess(self, images: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Images ``(B, 3, H, W)``."""
        return images.float() / 2 + 0.5

    def postprocess_video(self, videos: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Videos ``(B, 3, T, H, W)`` as ``(B, T, 3, H, W)``."""
        return videos.float().transpose(1, 2) / 2 + 0.5
