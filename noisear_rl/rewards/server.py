"""``noisear serve-reward``: any reward over HTTP, for other environments, machines and languages.

    noisear serve-reward configs/rewards/paper.yaml --port 8000
    noisear ppo --reward http://127.0.0.1:8000 …

``POST /score`` takes the two bodies of :mod:`noisear_rl.rewards.remote` and answers
``{"scores": [NUMBER_OR_NULL, …], "components": {SCORER: […], …}}``, ``GET /health`` tells the names of the scorers. One
batch is scored at a time; other requests wait, or are told 503 beyond ``max_waiting``. Nothing that a request holds is
unpickled, run, or opened as a file: images are PNG, JPEG or raw numbers, of limited size. There is no password: bind
to another address than loopback only in a network that you trust.

Shapes: ``B`` images ``(B, 3, H, W)`` in [0, 1].
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import math
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from noisear_rl.command import run_script
from noisear_rl.config import NonNegativeInt, PositiveFloat, PositiveInt, check_config, parse_config
from noisear_rl.images import to_tensor
from noisear_rl.rewards import RewardSpec, WeightedReward, load_reward
from noisear_rl.rewards.http import JSON
from noisear_rl.rewards.remote import SAFETENSORS
from noisear_rl.trust import is_loopback

LONGEST_PROMPT = 10_000  # characters
INSTALL = "`noisear serve-reward` needs FastAPI and uvicorn: pip install 'noisear-rl[serve]'"


@dataclass
class ServeConfig:
    """Options of the reward server."""

    reward: Annotated[RewardSpec | None, tyro.conf.Positional] = None
    """Scorer or reward file."""
    host: str = "127.0.0.1"
    """Address to listen at; only this machine reaches the default one."""
    port: NonNegativeInt = 8000
    """Port to listen at; 0 for any free one."""
    device: str | None = None
    """Device of the scorers, such as `cuda:1`; unset for the accelerator if there is one."""
    max_images: PositiveInt = 64
    """Images per request, at most."""
    max_side: PositiveInt = 4096
    """Height and width of an image in pixels, at most."""
    max_megabytes: PositiveFloat = 64.0
    """Size of a request's body in 2^20 bytes, at most."""
    max_waiting: PositiveInt = 256
    """Requests at the same time, at most."""
    body_timeout: PositiveFloat = 60.0
    """Seconds that a request's body may take to arrive."""

    def __post_init__(self) -> None:
        check_config(self)
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")


class Refused(ValueError):
    """A request that is not scored.

    Attributes:
        status: HTTP status.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class ScoreRequest(BaseModel):
    """The JSON body."""

    model_config = ConfigDict(extra="forbid", strict=True)
    images: list[str]
    prompts: list[str]


def read_request(content_type: str, body: bytes, config: ServeConfig) -> tuple[list[torch.Tensor], list[str]]:
    """Images ``(3, H, W)`` in [0, 1], which may differ in size, and prompts of a request.

    Raises:
        Refused: If the body is not what the module docstring describes, or exceeds a limit.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == JSON:
        try:
            asked = ScoreRequest.model_validate_json(body)
        except ValidationError as error:
            raise Refused(
                400, f"not a request: {error.errors(include_url=False, include_input=False)!r:.300}"
            ) from None
        prompts, images = asked.prompts, asked.images
    elif kind == SAFETENSORS:
        tensor, prompts = _read_safetensors(body)
        images = list(tensor)
    else:
        raise Refused(415, f"content type {kind!r:.80}; expected {JSON} or {SAFETENSORS}")
    if len(images) != len(prompts) or not 1 <= len(images) <= config.max_images:
        raise Refused(
            400, f"{len(images)} images and {len(prompts)} prompts; expected as many, and 1 to {config.max_images}"
        )
    if any(not prompt.strip() or len(prompt) > LONGEST_PROMPT for prompt in prompts):
        raise Refused(400, f"a prompt is empty or longer than {LONGEST_PROMPT} characters")
    pictures = [_read_image(image, config.max_side) if isinstance(image, str) else image for image in images]
    if any(not 1 <= side <= config.max_side for picture in pictures for side in picture.shape[1:]):
        raise Refused(400, f"images must be 1 to {config.max_side} pixels high and wide")
    return pictures, prompts


def _read_image(text: str, max_side: int) -> torch.Tensor:
    """An image ``(3, H, W)`` from base64 text of PNG or JPEG; its size is looked at before it is decoded."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG", "JPEG")) as image:
            if max(image.size) > max_side:
                raise Refused(400, f"an image of {image.size} pixels; expected at most {max_side} high and wide")
            return to_tensor(image.convert("RGB"))[0]
    except Refused:
        raise
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError, struct.error) as error:
        raise Refused(400, f"an image is no PNG or JPEG in base64 ({type(error).__name__})") from None


def _read_safetensors(body: bytes) -> tuple[torch.Tensor, list[str]]:
    try:
        tensors = load(body)
        size = int.from_bytes(body[:8], "little")
        prompts = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["prompts"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(400, f"no safetensors with prompts in its metadata ({type(error).__name__})") from None
    images = tensors.get("images")
    if tensors.keys() != {"images"} or images is None or images.dim() != 4 or images.shape[1] != 3:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise Refused(400, f"holds {shapes!r:.200}; expected one tensor 'images' (B, 3, H, W)")
    if not isinstance(prompts, list) or any(not isinstance(prompt, str) for prompt in prompts):
        raise Refused(400, "the prompts in the metadata are no JSON list of texts")
    if len(images) and not images.is_floating_point():
        raise Refused(400, f"images are {images.dtype}; expected floating-point numbers in [0, 1]")
    images = images.float()
    if len(images) and not ((images >= 0) & (images <= 1) | images.isnan()).all():
        raise Refused(400, "images must be in [0, 1]")
    return images, prompts


def scored(reward: WeightedReward, images: Sequence[torch.Tensor], prompts: Sequence[str]) -> dict[str, Any]:
    """The answer to a request; images of equal size are scored together."""
    total: list[float] = [math.nan] * len(images)
    parts: dict[str, list[float]] = {scorer.name: list(total) for scorer, _ in reward.rewards}
    rows: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        rows.setdefault(image.shape, []).append(i)
    with torch.no_grad():
        for same in rows.values():
            found = reward.components(torch.stack([images[i] for i in same]), [prompts[i] for i in same])
            for name, values in (found | {"": reward.total(found)}).items():
                for i, value in zip(same, values.tolist(), strict=True):
                    (parts[name] if name else total)[i] = value
    numbers = lambda values: [value if math.isfinite(value) else None for value in values]
    return {"scores": numbers(total), "components": {name: numbers(values) for name, values in parts.items()}}


def make_app(reward: WeightedReward, config: ServeConfig) -> Any:
    """The FastAPI application that scores with ``reward``.

    Raises:
        ValueError: If the reward is standardised by running statistics, or FastAPI is not installed.
    """
    if reward.normalize == "running":
        raise ValueError(
            "a reward standardised by running statistics depends on what was scored before, and checkpoints store it: "
            "serve it with normalize 'none' or 'fixed'"
        )
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.requests import ClientDisconnect
    except ImportError as error:
        raise ValueError(INSTALL) from error

    app = FastAPI(title="noisear serve-reward", docs_url=None, redoc_url=None)
    if is_loopback(config.host):  # a web page that gives this machine another name is refused
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", config.host])
    limit, busy = int(config.max_megabytes * 2**20), asyncio.Semaphore(1)

    async def body_of(request: Request) -> bytes:
        declared = request.headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdecimal() and len(declared) < 16) or int(declared) > limit:
            raise Refused(413, f"the body exceeds {config.max_megabytes:g} MB; send fewer images per request")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise Refused(413, f"the body exceeds {config.max_megabytes:g} MB; send fewer images per request")
        return bytes(body)

    def work(content_type: str, body: bytes) -> dict[str, Any]:
        images, prompts = read_request(content_type, body, config)
        return scored(reward, images, prompts)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"name": reward.name, "scorers": [scorer.name for scorer, _ in reward.rewards]}

    async def score(request: Request) -> Any:
        try:
            async with asyncio.timeout(config.body_timeout):
                body = await body_of(request)
            async with busy:
                return await asyncio.to_thread(work, request.headers.get("content-type", ""), body)
        except Refused as error:
            return JSONResponse({"error": str(error)}, error.status)
        except (TimeoutError, ClientDisconnect):
            return JSONResponse({"error": "the body did not arrive"}, 408)
        except Exception as error:  # of a scorer: the client decides whether to try again
            return JSONResponse({"error": f"the scorer failed: {type(error).__name__}: {error}"[:500]}, 500)

    # With postponed annotations FastAPI looks `Request` up in this module, where it is not.
    score.__annotations__ = {"request": Request}
    app.post("/score", response_model=None)(score)
    return app


def serve(config: ServeConfig) -> None:
    """Serves a reward until the process is told to stop (Ctrl-C or SIGTERM).

    Raises:
        ValueError: If there is no reward, it cannot be served, or an extra is missing.
        OSError: If the address is taken or not this machine's.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError(INSTALL) from error
    if config.reward is None:
        raise ValueError("expected a scorer or a reward file, such as: noisear serve-reward pickscore")
    reward = load_reward(config.reward, device=config.device)
    app = make_app(reward, config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.create_server((config.host, config.port), family=family, backlog=1024) as listening:
        shown = f"[{config.host}]" if family == socket.AF_INET6 else config.host
        print(f"serving {reward.name} at http://{shown}:{listening.getsockname()[1]}", flush=True)
        if not is_loopback(config.host):
            print("every machine that reaches this address can use it: there is no password", flush=True)
        options: dict[str, Any] = {"limit_concurrency": config.max_waiting, "access_log": False, "log_level": "warning"}
        uvicorn.Server(uvicorn.Config(app, lifespan="off", **options)).run(sockets=[listening])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    serve(parse_config(ServeConfig, argv, __doc__))


if __name__ == "__main__":
    run_script(main)
