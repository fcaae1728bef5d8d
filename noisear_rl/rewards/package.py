"""Scorers computed by their authors' own packages, ``image-reward`` and ``hpsv2``, for comparison.

The packages pin versions of common libraries that this library cannot use. They are therefore installed in a separate
environment and run in a separate process, which loads a model once and then scores batch after batch:

    python -m venv packages && packages/bin/pip install -r noisear_rl/assets/packages.txt

    options: {image-reward: {backend: package, python: packages/bin/python}}

Shapes: ``B`` images ``(B, 3, H, W)`` in [0, 1].
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from noisear_rl.images import to_uint8
from noisear_rl.rewards.pretrained import check_images

WORKER = Path(__file__).with_name("package_worker.py")
PACKAGES = {"image-reward": "image-reward", "hpsv2": "hpsv2", "hpsv2.1": "hpsv2"}


class PackageReward:
    """A scorer from another package, run in a separate process; returns the package's own scores.

    Args:
        name: ``image-reward``, ``hpsv2`` or ``hpsv2.1``.
        python: Interpreter of the environment with the package.
        device: Where the package runs; ``None`` for its default.

    Raises:
        ValueError: If no package computes this score.
        FileNotFoundError: If the interpreter does not exist.
    """

    def __init__(self, name: str, python: str | Path | None = None, device: str | None = None) -> None:
        if name not in PACKAGES:
            raise ValueError(f"no package computes {name!r}; backend 'package' supports {sorted(PACKAGES)}")
        if python is None or not Path(python).is_file():
            raise FileNotFoundError(
                f"python={python}: expected the interpreter of an environment with {PACKAGES[name]}: "
                "python -m venv packages && packages/bin/pip install -r noisear_rl/assets/packages.txt"
            )
        self.name, self.command = name, [str(python), str(WORKER), name, device or ""]
        self._process: subprocess.Popen[str] | None = None

    def score(self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Scores images: ``(B,)`` float32.

        Raises:
            ValueError: If shapes, values or prompts are invalid.
            RuntimeError: If the package's process fails; the message ends with its error output.
        """
        check_images(images, prompts)
        where = torch.device("cpu")
        if isinstance(images, torch.Tensor):
            where, images = images.device, [Image.fromarray(to_uint8(image.float())) for image in images]
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder) / f"{i}.png") for i in range(len(images))]
            for image, file in zip(images, files, strict=True):
                image.save(file)
            return torch.tensor(self._ask(files, list(prompts)), dtype=torch.float32, device=where)

    def _ask(self, files: list[str], prompts: list[str]) -> list[float]:
        if self._process is None or self._process.poll() is not None:
            # Errors go to a file, as the process would block on a full pipe that nobody reads.
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (stays open as long as the process runs)
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
            weakref.finalize(self, self._process.terminate)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"files": files, "prompts": prompts}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is read below
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{PACKAGES[self.name]} failed: {self._errors.read()[-2000:].strip()}")
        return json.loads(answer)
