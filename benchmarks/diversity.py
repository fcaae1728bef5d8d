"""How different can right images of a caption be? The trade-off of a sampler that redraws wrong images, ideally.

    python benchmarks/diversity.py              # three minutes on one idle core
    python benchmarks/diversity.py --render     # the page again from its data

No policy and no training: the images are those of Gaussian noise, told apart by the held-out detector. A sampler that
replaces a share ``r`` of its wrong images by right ones gets ``s = p + (1 - p) r`` of them right, where ``p`` is the
share of Gaussian noise, and its mean distance within a caption is ``s² RR + 2 s (1 - s) RW + (1 - s)² WW``, from the
mean distances between right (R) and wrong (W) images. Captions are those of the validation split; the figure shows the
policies and searches of ``shapes.md`` beside them, which were measured on test captions.
Writes ``diversity.md``, ``diversity.png`` and the data behind them, ``diversity.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from pages import RESULTS, markdown, page, parser_of, write  # in this folder
from shapes import RUNS  # in this folder
from tqdm.auto import tqdm

from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import evaluation_captions
from noisear_rl.evaluation.intervals import category_means
from noisear_rl.evaluation.results import from_record, read_record
from noisear_rl.provenance import provenance
from noisear_rl.report.plots import save_figure
from noisear_rl.rewards.layouts import layout_distances
from noisear_rl.rewards.shapes import ShapesClip, ShapesExact
from noisear_rl.samplers import as_sampler

DRAWN, BATCH, COMPARED = 1024, 128, 24  # images per caption at most; of each kind that are compared
SEED = 11_000_000
REDRAWN = (0.0, 0.25, 0.5, 0.75, 1.0)
KINDS = {"shapes-clip": "CLIP distance", "layout": "layout distance"}


def between(distances: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Returns the mean distance of all pairs of two images, one of each set; 0 if there is no such pair."""
    pairs = (first[:, None] & second) & ~np.eye(len(distances), dtype=bool)
    return float(distances[pairs].mean()) if pairs.any() else 0.0


def measure() -> dict[str, Any]:
    """Returns the share of right images and the mean distances of every caption."""
    start = provenance()
    sampler = as_sampler(load_denoiser("shapes-turbo"), None)
    clip, judge = ShapesClip(), ShapesExact()
    distances: dict[str, Callable[[torch.Tensor], np.ndarray]] = {
        "shapes-clip": lambda images: 1 - (clip.embed(images) @ clip.embed(images).T).detach().numpy(),
        "layout": lambda images: layout_distances(judge.detect(images)),
    }
    rows = []
    for i, caption in enumerate(tqdm(evaluation_captions("validation", 40), unit="caption")):
        right, images = torch.zeros(0, dtype=torch.bool), []
        for first in range(SEED + i * DRAWN, SEED + (i + 1) * DRAWN, BATCH):
            drawn = sampler([caption.text] * BATCH, list(range(first, first + BATCH))).images
            right = torch.cat([right, judge.score(drawn, [caption.text] * BATCH) > 0])
            images.append(drawn)
            if min(right.sum(), (~right).sum()) >= COMPARED:
                break
        kept = torch.cat([right.nonzero()[:COMPARED, 0], (~right).nonzero()[:COMPARED, 0]])
        is_right, compared = right[kept].numpy(), torch.cat(images)[kept]
        row: dict[str, Any] = {
            "caption": caption.text,
            "category": caption.category,
            "right": right.float().mean().item(),
        }
        for kind, distance in distances.items():
            between_all = distance(compared)
            sets = ((is_right, is_right), (is_right, ~is_right), (~is_right, ~is_right))
            row[kind] = [round(between(between_all, *pair), 5) for pair in sets]
        rows.append(row | {"images": len(right)})
    return {"captions": rows, "provenance": start}


def trade_off(record: dict[str, Any], redrawn: float) -> tuple[float, dict[str, float]]:
    """Returns the share of right images in % and the distances, Gaussian noise = 1; means over six categories."""
    rows = record["captions"]
    categories = np.array([row["category"] for row in rows])
    mean = lambda values: float(np.mean([values[categories == name].mean() for name in dict.fromkeys(categories)]))
    right = np.array([row["right"] for row in rows])

    def distance(kind: str, share: np.ndarray) -> float:
        both, one, none = np.array([row[kind] for row in rows]).T
        return mean(share**2 * both + 2 * share * (1 - share) * one + (1 - share) ** 2 * none)

    share = right + (1 - right) * redrawn
    return 100 * mean(share), {kind: distance(kind, share) / distance(kind, right) for kind in KINDS}


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    rows = []
    for redrawn in REDRAWN:
        right, spread = trade_off(record, redrawn)
        rows.append([f"{100 * redrawn:.0f} %", f"{right:.1f}", *(f"{spread[kind]:.2f}" for kind in KINDS)])
    count = sum(row["images"] for row in record["captions"])
    return page(
        [
            "How different right images of a caption can be: a sampler that replaces a share of the wrong images of "
            f"Gaussian noise by right ones of Gaussian noise. {len(record['captions'])} captions of the validation "
            f"split, {count:,} images, `shapes-turbo`, held-out detector; means over six categories, Gaussian "
            "noise = 1.",
            markdown(["wrong images replaced", "right, %", *KINDS.values()], rows),
            "![Right images against diversity](diversity.png)",
        ],
        "diversity",
        record["provenance"],
    )


def chart(record: dict[str, Any]) -> None:
    """Plots the trade-off, and the rows of ``shapes.md`` beside it."""
    results = from_record(read_record(RESULTS / "shapes.json"), RUNS)
    baseline = results.methods[results.baseline]
    curve = [trade_off(record, redrawn) for redrawn in np.linspace(0, 1, 21)]
    figure, panels = plt.subplots(1, 2, figsize=(11, 6), dpi=110, sharey=True)
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        axes.plot([spread[kind] for _, spread in curve], [right for right, _ in curve], "k-", label="ideal redrawing")
        for i, (group, names) in enumerate(results.groups.items()):
            members = [results.methods[name] for name in names]
            scores = 100 * results.by_seed(group, results.judge).mean(0)
            shares = category_means(scores, results.categories, results.prompts)
            spread = np.mean([m.diversity[kind].mean() for m in members]) / baseline.diversity[kind].mean()
            axes.plot(spread, np.mean(list(shares.values())), "o^s"[i // 10], color=f"C{i % 10}", label=group)
        axes.set(xlabel=f"{title} within a caption, Gaussian noise = 1")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("exactly right, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.28, 1, 1))
    save_figure(figure, RESULTS / "diversity.png")


def main() -> None:
    """Entry point."""
    render = parser_of(__doc__).parse_args().render
    write("diversity", table, None if render else measure())
    chart(read_record(RESULTS / "diversity.json"))


if __name__ == "__main__":
    main()
