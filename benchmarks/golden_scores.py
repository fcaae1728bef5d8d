"""Do our scorers reproduce the published scores? Needs the published weights.

    python benchmarks/golden_scores.py --images ImageReward/assets/images
    python benchmarks/golden_scores.py --images ImageReward/assets/images --scorers mps \
        --options '{"mps": {"weights": "MPS_overall_checkpoint.pth"}}'
    python benchmarks/golden_scores.py --images ImageReward/assets/images --package-python packages/bin/python

Four images have published scores (``golden_scores.json`` lists the sources). With ``--package-python``, the packages of
the authors also score these images and six rendered ones. Prints a table; exits with 1 if a score is beyond its
tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.denoisers.shapes.world import render, sample_scenes
from noisear_rl.images import to_uint8
from noisear_rl.rewards.package import PACKAGES, PackageReward
from noisear_rl.rewards.pretrained import PretrainedReward
from noisear_rl.rewards.registry import make_reward

GOLDEN = json.loads(Path(__file__).with_suffix(".json").read_text())
RENDERED = 6


def rendered_images() -> tuple[list[Image.Image], list[str]]:
    """Renders six enlarged images of the shapes world, with their captions."""
    captions = balanced_captions("validation", RENDERED)
    rng = np.random.default_rng(0)
    pixels = render(sample_scenes(captions, rng), rng)
    images = [Image.fromarray(to_uint8(image)).resize((512, 512)) for image in pixels]
    return images, [caption.text for caption in captions]


def published_images(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """Reads the four images with published scores, with their prompts."""
    missing = [name for name in GOLDEN["images"] if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{folder} lacks {missing}: expected the {GOLDEN['where']}")
    return [Image.open(folder / name) for name in GOLDEN["images"]], [GOLDEN["prompt"]] * len(GOLDEN["images"])


def scores_of(scorer: str, images: list[Image.Image], prompts: list[str], **options: Any) -> list[float]:
    """Scores PIL images with one scorer."""
    reward = cast(PretrainedReward | PackageReward, make_reward(scorer, **options))
    return reward.score(images, prompts).tolist()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help=GOLDEN["where"])
    parser.add_argument("--scorers", nargs="+", choices=sorted(GOLDEN["scores"]), default=sorted(GOLDEN["scores"]))
    parser.add_argument("--options", type=json.loads, default={}, help="arguments by scorer, as JSON")
    parser.add_argument("--package-python", type=Path, help="Python interpreter with the original packages")
    arguments = parser.parse_args()

    published, prompts = published_images(arguments.images)
    rendered, captions = rendered_images()
    images, prompts = published + rendered, prompts + captions
    names = [*GOLDEN["images"], *(f"rendered {i}" for i in range(RENDERED))]
    print("| scorer | image | ours | published | package | difference | |\n" + "|---" * 7 + "|")
    worst = 0
    for scorer in arguments.scorers:
        golden = GOLDEN["scores"][scorer]
        ours = scores_of(scorer, images, prompts, **arguments.options.get(scorer, {}))
        package = None
        if arguments.package_python and scorer in PACKAGES:
            package = scores_of(scorer, images, prompts, backend="package", python=arguments.package_python)
        for i, (name, score) in enumerate(zip(names, ours, strict=True)):
            printed = golden["values"][i] if i < len(golden["values"]) else None
            expected = [value for value in (printed, package[i] if package else None) if value is not None]
            off = max((abs(score - value) for value in expected), default=0.0)
            bad = off > golden["tolerance"]
            worst += bad
            cells = [f"{value:.4f}" if value is not None else "" for value in (printed, package and package[i])]
            print(f"| {scorer} | {name} | {score:.4f} | {' | '.join(cells)} | {off:.4f} | {'OFF' if bad else 'ok'} |")
    print(f"\n{worst} scores beyond their tolerance")
    sys.exit(bool(worst))


if __name__ == "__main__":
    main()
