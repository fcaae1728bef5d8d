"""Scorers computed by their authors' own packages, ``image-reward`` and ``hpsv2``, to compare with.

The packages pin versions of common libraries that this one cannot use, so they live in an environment of their own and
run in a process of their own, which loads a model once and answers batch after batch:

    python -m venv packages && packages/bin/pip install -r noisear_rl/assets/packages.txt

    options: {image-reward: {backend: package, python: packages/bin/python}}

Shapes: ``B`` pictures ``(B, 3, H, W)`` in [0, 1].
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
from noisear_rl.rewards.pretrained import check_pictures

WORKER = Path(__file__).with_name("package_worker.py")
PACKAGES = {"image-reward": "image-reward", "hpsv2": "hpsv2", "hpsv2.1": "hpsv2"}


class PackageReward:
    """A scorer of another package, in another process. Scores are the package's own.

    Args:
        name: ``image-reward``, ``hpsv2`` or ``hpsv2.1``.
        python: The interpreter of the environment that holds the package.
        device: Where the package runs; ``None`` for its default.

    Raises:
        ValueError: If no package computes this score.
        FileNotFoundError: If there is no such interpreter.
    """

    def __init__(self, name: str, python: str | Path | None = None, device: str | None = None):
        if name not in PACKAGES:
            raise ValueError(f"no package computes {name!r}; backend 'package' knows {sorted(PACKAGES)}")
        if python is None or not Path(python).is_file():
            raise FileNotFoundError(
                f"python={python}: expected the interpreter of an environment with {PACKAGES[name]}: "
                "python -m venv packages && packages/bin/pip install -r noisear_rl/assets/packages.txt"
            )
        self.name, self.command = name, [str(python), str(WORKER), name, device or ""]
        self._process: subprocess.Popen[str] | None = None

    def score(self, images: torch.Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Scores pictures: ``(B,)`` float32.

        Raises:
            ValueError: If shapes, values or prompts are wrong.
            RuntimeError: If the package's process fails; ends with what it said.
        """
        check_pictures(images, prompts)
        where = torch.device("cpu")
        if isinstance(images, torch.Tensor):
            where, images = images.device, [Image.fromarray(to_uint8(image.float())) for image in images]
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder) / f"{i}.png") for i in range(len(images))]
            for picture, file in zip(images, files, strict=True):
                picture.save(file)
            return torch.tensor(self._ask(files, list(prompts)), dtype=torch.float32, device=where)

    def _ask(self, files: list[str], prompts: list[str]) -> list[float]:
        if self._process is None or self._process.poll() is not None:
            # The errors go to a file: a full pipe that nobody reads would stop the process.
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
            weakref.finalize(self, self._process.terminate)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"files": files, "prompts": prompts}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it said why below
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{PACKAGES[self.name]} failed: {self._errors.read()[-2000:].strip()}")
        return json.loads(answer)
