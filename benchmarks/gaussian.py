"""How many images does Gaussian noise get right? One figure per denoiser, on validation and test captions.

    python benchmarks/gaussian.py                                  # `shapes-turbo`
    python benchmarks/gaussian.py --denoiser shapes-turbo shapes   # both; a few minutes each on two idle cores
    python benchmarks/gaussian.py --render                         # the page again from its data

Every caption has a meaning of its own (``evaluation_captions``, at most 40 per category and split), and every category
equally many images: so many that the error of the mean over categories due to noise is at most ± 0.5 points (95 %),
whatever the share of right images is. Tables of other benchmarks show this figure in the row of Gaussian noise
(:func:`figure`); their gains are still paired with Gaussian noise of the same seeds. Scores go to ``runs/gaussian``;
interrupted runs resume. Writes ``gaussian.md`` and the scores behind it, ``gaussian.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from noisear_rl.denoisers import EMBEDDED, load_denoiser
from noisear_rl.denoisers.shapes.architecture import ASSETS
from noisear_rl.denoisers.shapes.captions import CATEGORIES, Caption, Split, evaluation_captions
from noisear_rl.evaluation.intervals import Estimate, bootstrap, category_means
from noisear_rl.evaluation.results import read_record, write_page
from noisear_rl.files import check_manifest, sha256, write_atomically
from noisear_rl.provenance import provenance
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import as_sampler

RUNS, RESULTS = Path("runs/gaussian"), Path(__file__).parent / "results"
PARTS: tuple[Split, ...] = ("validation", "test")
JUDGE = "shapes-exact"
IMAGES = 6_500  # per category and part: 1.96 * sqrt(0.25 / (6 * 6,500)) < 0.5 %
SEED, BATCH = 9_000_000, 64


@dataclass
class Figure:
    """What Gaussian noise gets right, in %.

    Attributes:
        right: Mean over categories, with the interval over captions.
        noise: Half the width of its 95 % interval over noise, on these captions.
        categories: Mean by category.
        images: Images denoised.
    """

    right: Estimate
    noise: float
    categories: dict[str, float]
    images: int


def figure(record: dict[str, Any], denoiser: str, parts: Sequence[Split] = PARTS) -> Figure:
    """Returns the figure of one denoiser from the record in ``gaussian.json``; several parts are pooled.

    Raises:
        KeyError: If the denoiser was not measured.
    """
    right = [
        np.array(list(bits), dtype=float) for part in parts for bits in record["denoisers"][denoiser]["right"][part]
    ]
    names = [category for part in parts for _, category in record["captions"][part]]
    shares = 100 * np.array([values.mean() for values in right])[:, None]  # (captions, 1)
    weights = [1 / (len(set(names)) * names.count(name)) for name in names]
    errors = [weight**2 * values.var(ddof=1) / len(values) for weight, values in zip(weights, right, strict=True)]
    return Figure(
        bootstrap(shares, names), 196 * math.sqrt(sum(errors)), category_means(shares, names), sum(map(len, right))
    )


def measure(denoiser: str, captions: dict[Split, list[Caption]], images: int, runs: Path) -> dict[str, Any]:
    """Denoises and judges Gaussian noise; what a run has finished is not repeated.

    Args:
        denoiser: Name of an embedded denoiser.
        captions: Captions by part.
        images: Images per category and part, at least.
        runs: Folder of the scores.

    Returns:
        Settings, and one string of ``0`` and ``1`` per caption and part, one character per image.
    """
    model, judge = load_denoiser(denoiser), load_reward(JUDGE)
    weights = sorted(
        path for folder in ("pipeline", "turbo", "held_out_detector") for path in (ASSETS / folder).rglob("*")
    )
    settings = {
        "num_inference_steps": model.num_inference_steps,
        "guidance_scale": model.guidance_scale,
        "weights": sha256([sha256(path) for path in weights if path.suffix == ".safetensors"]),
    }
    of_run = {"captions": sha256([c.text for part in captions.values() for c in part]), "images": images, "seed": SEED}
    check_manifest(runs / denoiser, settings | of_run)
    found: dict[str, list[str]] = {}
    sampler, first = as_sampler(model, None), SEED
    work = []
    for part, chosen in captions.items():
        for i, caption in enumerate(chosen):
            count = max(2, math.ceil(images / sum(c.category == caption.category for c in chosen)))
            work.append((runs / denoiser / part / f"{i:03d}.txt", caption.text, range(first, first + count)))
            first += count
    with tqdm(total=first - SEED, desc=denoiser, unit="image") as bar:
        for file, text, seeds in work:
            if not file.exists():
                bits = ""
                for start in range(0, len(seeds), BATCH):
                    batch = seeds[start : start + BATCH]
                    drawn = sampler([text] * len(batch), list(batch)).images
                    scores = judge.components(drawn, [text] * len(batch))[JUDGE]
                    bits += "".join(str(int(score)) for score in scores.tolist())
                    bar.update(len(batch))
                write_atomically(file, bits)
            else:
                bar.update(len(seeds))
            found.setdefault(file.parent.name, []).append(file.read_text())
    return {**settings, "provenance": provenance(), "right": found}


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    count = {part: len(record["captions"][part]) for part in PARTS}
    lines = [
        "Exactly right images in % from Gaussian noise, held-out detector, mean over six categories. In brackets: 95 % "
        f"intervals over captions; noise: half the 95 % interval over noise on these captions. {count['validation']} "
        f"validation and {count['test']} test captions, every one with a meaning of its own; equally many images in "
        "every category.",
        "",
        f"| denoiser | captions | images | right | noise | {' | '.join(CATEGORIES)} |",
        "|" + "---|" * (5 + len(CATEGORIES)),
    ]
    for denoiser in record["denoisers"]:
        for title, parts in (("validation", PARTS[:1]), ("test", PARTS[1:]), ("both", PARTS)):
            found = figure(record, denoiser, parts)
            means = " | ".join(f"{found.categories[name]:.1f}" for name in CATEGORIES)
            cells = f"{denoiser} | {title} | {found.images:,} | {found.right} | ± {found.noise:.2f} | {means}"
            lines.append(f"| {cells} |")
    lines.append("")
    for denoiser, settings in record["denoisers"].items():
        steps, guidance = settings["num_inference_steps"], settings["guidance_scale"]
        weights = f"weights {settings['weights'][:12]}"
        lines.append(f"- `{denoiser}`: {steps} steps, guidance {guidance:g}, {weights}. {settings['provenance']}")
    return (
        "\n".join([*lines, "", f"Command: `python benchmarks/gaussian.py --denoiser {' '.join(record['denoisers'])}`."])
        + "\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what is missing, and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", nargs="+", choices=EMBEDDED, default=["shapes-turbo"], help="what to measure")
    parser.add_argument("--per-category", type=int, default=40, help="captions per category and part at most")
    parser.add_argument("--images", type=int, default=IMAGES, help="images per category and part at least")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the scores")
    parser.add_argument("--page", type=Path, default=RESULTS / "gaussian.md", help="page to write, data next to it")
    parser.add_argument("--render", action="store_true", help="render the page again from its data and stop")
    arguments = parser.parse_args(argv)
    if arguments.render:
        print(write_page(arguments.page, table))
        return
    captions = {part: evaluation_captions(part, arguments.per_category) for part in PARTS}
    texts = {part: [[c.text, c.category] for c in chosen] for part, chosen in captions.items()}
    try:
        known = read_record(arguments.page.with_suffix(".json"))
    except FileNotFoundError:
        known = {}
    measured = {name: measure(name, captions, arguments.images, arguments.runs) for name in arguments.denoiser}
    weights = {part["weights"] for part in measured.values()}
    others = known["denoisers"].items() if known.get("captions") == texts else ()
    kept = {name: part for name, part in others if part["weights"] in weights}  # measured before, with the same weights
    print(write_page(arguments.page, table, {"captions": texts, "denoisers": kept | measured}))


if __name__ == "__main__":
    main()
