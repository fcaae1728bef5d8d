"""A scorer behind an address: another environment, another machine, a service.

A request is ``POST /score`` (or the path of the address), with a body of one of two types, none of which is a pickle:

- ``application/json``: ``{"images": [BASE64_PNG, …], "prompts": [TEXT, …]}``. Pixels have 8 bits.
- ``application/x-safetensors``: a tensor ``images`` ``(B, 3, H, W)`` in [0, 1], and the prompts as a JSON list under
  ``prompts`` in the metadata. Exact.

The answer is ``{"scores": [NUMBER_OR_NULL, …]}``, one per image; ``null`` is no score. Other keys are ignored.
``noisear serve-reward`` (:mod:`noisear_rl.rewards.server`) is such a server.

Shapes: ``B`` images ``(B, 3, H, W)`` in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save

from noisear_rl.images import to_tensor
from noisear_rl.rewards.http import JSON, HTTPReward, ServerError, base64_text, png

SAFETENSORS = "application/x-safetensors"
Body = Literal["png", "safetensors"]


class RemoteReward(HTTPReward):
    """The scores that a server gives; see the module docstring.

    Args:
        *args: See :class:`~noisear_rl.rewards.http.HTTPReward`.
        body: ``png``, or ``safetensors`` to send exact pixels.
        **options: See :class:`~noisear_rl.rewards.http.HTTPReward`.

    Raises:
        ValueError: If an option is invalid.
    """

    path = "/score"

    def __init__(self, *args: Any, body: Body = "png", **options: Any) -> None:
        if body not in get_args(Body):
            raise ValueError(f"unknown body {body!r}; expected one of {get_args(Body)}")
        super().__init__(*args, **options)
        self.body = body

    def ask(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        """See the base class."""
        if self.body == "png":
            content = {"images": [base64_text(png(image)) for image in images], "prompts": list(prompts)}
            answer = self.post(self.url, json.dumps(content).encode(), JSON)
        else:
            tensors = [part if isinstance(part, torch.Tensor) else to_tensor(part.convert("RGB"))[0] for part in images]
            if len({tensor.shape for tensor in tensors}) > 1:
                raise ValueError(f"scorer {self.name!r}: images of several sizes need body 'png'")
            packed = save({"images": torch.stack(tensors).contiguous()}, {"prompts": json.dumps(list(prompts))})
            answer = self.post(self.url, packed, SAFETENSORS)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise ServerError(f"{self.url} answered {answer!r:.80}; expected {{'scores': [number or null, …]}}", False)
        return [self._number(value) for value in scores]

    def _number(self, value: Any) -> float:
        if value is None:
            return float("nan")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ServerError(f"{self.url} answered the score {value!r:.80}; expected a number or null", False)
        try:
            return float(value)
        except OverflowError:
            return float("inf")
