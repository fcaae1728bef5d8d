"""Scorers that ask a server: bounded requests, and no score where a request fails.

Shapes: ``B`` images ``(B, 3, H, W)`` in [0, 1].
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
import urllib3
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from noisear_rl.config import PositiveFloat, PositiveInt
from noisear_rl.images import to_uint8
from noisear_rl.rewards.pretrained import check_images
from noisear_rl.rewards.within import within
from noisear_rl.trust import check_address

LARGEST_ANSWER = 16 * 2**20  # bytes
LONGEST_PAUSE = 5.0  # seconds between two tries
MOST_CAUSES = 20  # that are told
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
JSON = "application/json"
COUNTS, SECONDS = TypeAdapter(PositiveInt), TypeAdapter(PositiveFloat)


class ServerError(ConnectionError):
    """A server did not answer, or not with what was asked for.

    Attributes:
        temporary: Whether the same request may succeed later.
    """

    def __init__(self, message: str, temporary: bool):
        super().__init__(message)
        self.temporary = temporary


def is_address(text: str) -> bool:
    """Whether a scorer's name is an address."""
    return text.startswith(("http://", "https://"))


def checked_address(url: str, default_path: str = "") -> str:
    """An address with a path.

    Raises:
        ValueError: If it is no http(s) address of a server, or holds a password.
        UntrustedCodeError: If a file that is not trusted names a server on another machine.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{url!r:.200} is no address: {error}") from error
    if not is_address(url) or not host or port == 0 or not url.isprintable() or " " in url:
        raise ValueError(f"{url!r:.200} is no address; expected http://HOST:PORT or http://HOST:PORT/PATH")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError(f"the address of {host!r} holds a user, a password or a fragment; expected http://HOST:PORT")
    check_address(url, host)
    return url if parts.path.strip("/") else url.rstrip("/") + default_path


def png(image: torch.Tensor | Image.Image) -> bytes:
    """An image ``(3, H, W)`` in [0, 1], or a PIL image, as PNG."""
    file = io.BytesIO()
    picture = Image.fromarray(to_uint8(image.float())) if isinstance(image, torch.Tensor) else image.convert("RGB")
    picture.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def base64_text(content: bytes) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(content).decode("ascii")


class HTTPReward(ABC):
    """A scorer whose scores come from a server.

    A request that fails is repeated after a growing pause; what still has no score gets NaN, so that the episode is
    dropped and counted, and a warning names the cause. Where nothing has ever been answered, the first call that gets
    no score at all raises instead: the address is wrong, or the server is not running.

    Args:
        url: Address of the server.
        name: Name in records; ``None`` for host and port.
        required: Whether a failure is an error rather than NaN.
        timeout: Seconds that a request may take, answer included.
        retries: Repetitions of a request that failed for a reason that may pass.
        batch_size: Images per request.
        concurrency: Requests at the same time.

    Attributes:
        failures: Images that got no score so far.

    Raises:
        ValueError: If an option is out of range or the address is none.
        UntrustedCodeError: See :func:`checked_address`.
    """

    path = ""

    def __init__(
        self,
        url: str,
        name: str | None = None,
        *,
        required: bool = False,
        timeout: float = 60.0,
        retries: int = 2,
        batch_size: int = 16,
        concurrency: int = 4,
    ) -> None:
        self.url = checked_address(url, self.path)
        self.name = name or urlsplit(url).netloc
        try:
            self.batch_size, self.concurrency = (COUNTS.validate_python(n) for n in (batch_size, concurrency))
            self.timeout = SECONDS.validate_python(timeout)
            self.retries = COUNTS.validate_python(retries + 1) - 1
        except (ValidationError, TypeError) as error:
            raise ValueError(
                f"scorer {self.name!r}: timeout must be a positive number of seconds, retries at least 0, batch_size "
                f"and concurrency at least 1, got {timeout!r}, {retries!r}, {batch_size!r} and {concurrency!r}"
            ) from error
        if not isinstance(required, bool):
            raise ValueError(f"scorer {self.name!r}: required must be true or false, got {required!r}")
        self.required, self.failures = required, 0
        self._answered, self._warned, self._lock = False, set[str](), threading.Lock()
        self._pool = urllib3.PoolManager(maxsize=self.concurrency, retries=False)

    @abstractmethod
    def ask(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        """Scores of one request's images, tensors ``(3, H, W)`` or PIL images.

        Raises:
            ServerError: If there are none.
        """

    def score(self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Scores images: ``(B,)`` float32 on their device, without gradient; NaN where a request failed.

        Raises:
            ValueError: If shapes, values or prompts are invalid.
            ServerError: If a request failed and ``required`` is set, or nothing was ever answered.
        """
        check_images(images, prompts)
        where = torch.device("cpu")
        if isinstance(images, torch.Tensor):
            where, images = images.device, images.detach().cpu()
        starts = range(0, len(prompts), self.batch_size)
        parts = [(images[i : i + self.batch_size], prompts[i : i + self.batch_size]) for i in starts]
        if not parts:
            return torch.zeros(0, device=where)
        with ThreadPoolExecutor(min(self.concurrency, len(parts))) as executor:
            answers = list(executor.map(lambda part: self._attempt(*part), parts))
        errors = [answer for answer in answers if isinstance(answer, ServerError)]
        self._answered |= len(errors) < len(answers)
        if errors and (self.required or not self._answered):
            raise errors[0]
        scores = []
        for answer, (part, _) in zip(answers, parts, strict=True):
            scores += [float("nan")] * len(part) if isinstance(answer, ServerError) else answer
            if isinstance(answer, ServerError):
                self._count(answer, len(part))
        return torch.tensor(scores, dtype=torch.float32, device=where)

    def _attempt(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float] | ServerError:
        """The scores of one request, or why there are none after all retries."""
        for number in range(self.retries + 1):
            try:
                found = self.ask(images, prompts)
                if len(found) != len(prompts):
                    raise ServerError(f"{self.url} answered {len(found)} scores for {len(prompts)} images", False)
                return found
            except ServerError as error:
                if not error.temporary or number == self.retries:
                    return error
            time.sleep(min(0.1 * 2**number, LONGEST_PAUSE))
        raise AssertionError  # the last try returns

    def _count(self, error: ServerError, images: int) -> None:
        """Counts images without a score; each cause is told once."""
        with self._lock:
            self.failures += images
            cause = str(error)
            told = cause in self._warned or len(self._warned) == MOST_CAUSES
            self._warned |= set() if told else {cause}
        if not told:
            warnings.warn(f"scorer {self.name!r}: {images} images get no score: {cause}", stacklevel=4)

    def post(self, url: str, body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> Any:
        """Sends a request and returns its answer, parsed as JSON. Redirects are not followed.

        Raises:
            ServerError: If there is no answer in time, one above :data:`LARGEST_ANSWER`, an error, or no JSON.
        """
        try:
            status, content = within(self.timeout, lambda: self._send(url, body, content_type, headers or {}))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            late = isinstance(error, TimeoutError | urllib3.exceptions.ReadTimeoutError)
            cause = f"no answer in {self.timeout:g} seconds" if late else f"{type(error).__name__}: {error}"
            raise ServerError(f"{url}: {cause:.300}", True) from error
        if status != 200:
            said = content[:300].decode("utf-8", "replace").strip()
            raise ServerError(f"{url} answered {status}: {said}", status in TRY_AGAIN)
        if len(content) > LARGEST_ANSWER:
            raise ServerError(f"{url} answered more than {LARGEST_ANSWER} bytes", False)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{url} answered no JSON: {content[:80]!r}", False) from error

    def _send(self, url: str, body: bytes, content_type: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        timeout = urllib3.Timeout(connect=self.timeout, read=self.timeout)
        sent = {"Content-Type": content_type, "Accept": JSON, **headers}
        response = self._pool.request(
            "POST", url, body=body, headers=sent, timeout=timeout, redirect=False, preload_content=False
        )
        try:
            content = response.read(LARGEST_ANSWER + 1)
            if len(content) <= LARGEST_ANSWER:
                response.release_conn()
            return response.status, content
        finally:
            response.close()
