"""Runs in the environment of a scorer's own package, started by :mod:`noisear_rl.rewards.package`.

    python package_worker.py image-reward|hpsv2|hpsv2.1 [DEVICE]

Reads one JSON object per line, ``{"files": [...], "prompts": [...]}``, and answers with a JSON list of scores. Uses
nothing from this library, and no other packages than the scorer's own and Pillow.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
from collections.abc import Callable

sys.path.pop(0)  # this folder, whose clip.py would hide the package of that name

from PIL import Image


def image_reward(device: str) -> Callable[[Image.Image, str], float]:
    """The scorer of ``image-reward``: (PIL image, prompt) → score."""
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0", **({"device": device} if device else {}))
    return lambda image, prompt: model.score(prompt, image)


def hpsv2(version: str) -> Callable[[Image.Image, str], float]:
    """The scorer of ``hpsv2``; the package reads its checkpoint on every call.

    Its wheel lacks CLIP's byte pairs, which are copied from ``openai-clip`` to where the package looks for them.
    """
    import clip
    import hpsv2 as package

    file = pathlib.Path(package.__file__).parent / "src/open_clip/bpe_simple_vocab_16e6.txt.gz"
    if not file.exists():
        shutil.copy(pathlib.Path(clip.__file__).parent / file.name, file)
    return lambda image, prompt: float(package.score(image, prompt, hps_version=version)[0])


def main(name: str, device: str = "") -> None:
    """Answers requests until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # packages print
    score = image_reward(device) if name == "image-reward" else hpsv2("v2.1" if name == "hpsv2.1" else "v2.0")
    for line in sys.stdin:
        asked = json.loads(line)
        scores = []
        for file, prompt in zip(asked["files"], asked["prompts"]):  # noqa: B905 (older interpreters)
            with Image.open(file) as image:
                scores.append(float(score(image.convert("RGB"), prompt)))
        print(json.dumps(scores), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
