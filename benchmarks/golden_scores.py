"""Do our scorers give the published scores? For those who have the real weights.

    python benchmarks/golden_scores.py --images ImageReward/assets/images
    python benchmarks/golden_scores.py --images ImageReward/assets/images --scorers mps \
        --options '{"mps": {"weights": "MPS_overall_checkpoint.pth"}}'
    python benchmarks/golden_scores.py --images ImageReward/assets/images --package-python packages/bin/python

Four pictures have published scores (``golden_scores.json`` says where they come from). With ``--package-python``, the
authors' own packages score these and six drawn pictures beside ours. Prints a table; exits with 1 if a score is further
off than its tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.denoisers.shapes.world import render, sample_scenes
from noisear_rl.images import to_uint8
from noisear_rl.rewards.package import PACKAGES
from noisear_rl.rewards.registry import make_reward

GOLDEN = json.loads(Path(__file__).with_suffix(".json").read_text())
DRAWN = 6


def drawn_pictures() -> tuple[list[Image.Image], list[str]]:
    """Six pictures of the shapes world, enlarged, with their captions."""
    captions = balanced_captions("held_out", DRAWN)
    rng = np.random.default_rng(0)
    images = render(sample_scenes(captions, rng), rng)
    pictures = [Image.fromarray(to_uint8(image)).resize((512, 512)) for image in images]
    return pictures, [caption.text for caption in captions]


def published_pictures(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """The four pictures that have published scores."""
    missing = [name for name in GOLDEN["images"] if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{folder} lacks {missing}: expected the {GOLDEN['where']}")
    return [Image.open(folder / name) for name in GOLDEN["images"]], [GOLDEN["prompt"]] * len(GOLDEN["images"])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help=GOLDEN["where"])
    parser.add_argument("--scorers", nargs="+", choices=sorted(GOLDEN["scores"]), default=sorted(GOLDEN["scores"]))
    parser.add_argument("--options", type=json.loads, default={}, help="arguments by scorer, as JSON")
    parser.add_argument("--package-python", type=Path, help="interpreter of an environment with the original packages")
    arguments = parser.parse_args()

    pictures, prompts = published_pictures(arguments.images)
    more, captions = drawn_pictures()
    names = [*GOLDEN["images"], *(f"drawn {i}" for i in range(DRAWN))]
    print("| scorer | picture | ours | published | package | difference | |\n" + "|---" * 7 + "|")
    worst = 0
    for scorer in arguments.scorers:
        golden = GOLDEN["scores"][scorer]
        ours = make_reward(scorer, **arguments.options.get(scorer, {})).score(pictures + more, prompts + captions)
        package = None
        if arguments.package_python and scorer in PACKAGES:
            package = make_reward(scorer, backend="package", python=arguments.package_python)
            package = package.score(pictures + more, prompts + captions).tolist()
        for i, (name, score) in enumerate(zip(names, ours.tolist(), strict=True)):
            published = golden["values"][i] if i < len(golden["values"]) else None
            expected = [value for value in (published, package[i] if package else None) if value is not None]
            off = max((abs(score - value) for value in expected), default=0.0)
            bad = off > golden["tolerance"]
            worst += bad
            cells = [f"{value:.4f}" if value is not None else "" for value in (published, package and package[i])]
            print(f"| {scorer} | {name} | {score:.4f} | {' | '.join(cells)} | {off:.4f} | {'OFF' if bad else 'ok'} |")
    print(f"\n{worst} scores beyond their tolerance")
    sys.exit(bool(worst))


if __name__ == "__main__":
    main()
