"""Does a learned prior help on captions that no training saw? Pairs, NLL, REINFORCE, three seeds, held-out judge.

    python benchmarks/held_out.py                # train what is missing, then evaluate
    python benchmarks/held_out.py --train 0      # one seed and stop; several processes can share the seeds
    python benchmarks/held_out.py --stages nll     # without REINFORCE

Every stage is a shipped preset (``configs/shapes``) with the seed set: ``signal_leak`` pairs of Gaussian noise, NLL
on them, and REINFORCE from the NLL policy. Runs go to ``runs/held_out``; an interrupted one goes on. Writes
``benchmarks/results/held_out.md`` and ``held_out.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from noisear_rl.algos import nll, reinforce
from noisear_rl.algos.evaluate import provenance
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import CATEGORIES, balanced_captions
from noisear_rl.evaluation import GAUSSIAN, MethodScores, best_of, bootstrap, diversity, evaluate
from noisear_rl.pairs import PairsConfig, build_pairs
from noisear_rl.report import save_figure
from noisear_rl.rewards import load_reward
from noisear_rl.rewards.shapes import ShapesClip
from noisear_rl.shards import read_manifest
from noisear_rl.training import load_policy, load_yaml, read_records, write_atomically

SEEDS = (0, 1, 2)
ROOT = Path(__file__).parents[1]
RUNS, RESULTS = Path("runs/held_out"), ROOT / "benchmarks/results"
PRESETS = ROOT / "configs/shapes"
TITLES = {"nll": "NLL on signal-leak pairs", "reinforce": "… then REINFORCE"}
COLORS = {GAUSSIAN: "0.6", "nll": "#4393c3", "reinforce": "#b2182b", "best of 4": "0.3"}
CAPTIONS, SAMPLES = 240, 8
SCORERS = {"shapes-exact": 1.0, "shapes-match": 1.0}


def folder_of(stage: str, seed: int) -> Path:
    """Where a stage's run lies."""
    return RUNS / f"{stage}-seed-{seed}"


def train(seed: int, stages: list[str]) -> None:
    """Runs one seed's stages; finished ones return at once."""
    pairs, start = folder_of("pairs", seed), folder_of("nll", seed)
    options = {"output_dir": pairs, "seed": (seed + 1) * 10_000_000}
    build_pairs(dataclasses.replace(load_yaml(PairsConfig, PRESETS / "signal_leak.yaml"), **options))
    options = {"output_dir": start, "pairs": pairs, "seed": seed, "resume": True}
    nll.train(dataclasses.replace(load_yaml(nll.NLLConfig, PRESETS / "nll_signal_leak.yaml"), **options))
    if "reinforce" in stages:
        preset = load_yaml(reinforce.ReinforceConfig, PRESETS / "reinforce_transfer.yaml")
        options = {"output_dir": folder_of("reinforce", seed), "init_from": str(start), "seed": seed, "resume": True}
        reinforce.train(dataclasses.replace(preset, **options))


def images_of(stage: str, seed: int) -> int:
    """Pictures that were denoised to train a policy, those of the stages before it included."""
    made = read_manifest(folder_of("pairs", seed))
    before = made["pairs"] * made["rounds"]
    return before + (int(read_records(folder_of(stage, seed))[-1]["charts/images"]) if stage == "reinforce" else 0)


def picture(path: Path, bars: dict[str, np.ndarray], categories: np.ndarray) -> None:
    """Draws the share of right pictures by category; ``bars`` holds scores ``(P, …)`` in % by method."""
    figure, axes = plt.subplots(figsize=(10, 3.4), dpi=110)
    width = 0.8 / len(bars)
    for i, (name, scores) in enumerate(bars.items()):
        means = [scores[categories == category].mean() for category in CATEGORIES]
        where = np.arange(len(means) + 1) + (i - (len(bars) - 1) / 2) * width
        label = {GAUSSIAN: "Gaussian noise", "best of 4": "Gaussian, best of 4 (4 x the cost)"}.get(name)
        axes.bar(where, [*means, np.mean(means)], width, color=COLORS[name], label=label or TITLES[name])
    axes.set_xticks(range(len(CATEGORIES) + 1), [*(c.replace("_", " ") for c in CATEGORIES), "mean"])
    axes.set(ylabel="exactly right, %", ylim=(0, 100), title="Held-out captions, held-out judge, 3 seeds")
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, choices=SEEDS, help="train one seed and stop")
    parser.add_argument("--stages", nargs="+", choices=tuple(TITLES), default=list(TITLES), help="methods to include")
    arguments = parser.parse_args()
    for seed in SEEDS if arguments.train is None else [arguments.train]:
        train(seed, arguments.stages)
    if arguments.train is not None:
        return

    captions = balanced_captions("held_out", CAPTIONS)
    prompts, categories = [c.text for c in captions], np.array([c.category for c in captions])
    policies = {f"{stage} {seed}": load_policy(folder_of(stage, seed)) for stage in arguments.stages for seed in SEEDS}
    denoiser, reward = load_denoiser("shapes-turbo"), load_reward(SCORERS)
    methods = {GAUSSIAN: None} | policies
    results = evaluate(denoiser, reward, methods, prompts, SAMPLES, seed=2_000_000, keep_images=SAMPLES)
    report(results, categories, arguments.stages)


def report(results: dict[str, MethodScores], categories: np.ndarray, stages: list[str]) -> None:
    """Writes the table and the picture."""
    embed = ShapesClip().image_features
    with torch.no_grad():
        spread = {name: diversity(result.images, embed).mean() for name, result in results.items()}
    exact = {name: result.scores["shapes-exact"] * 100 for name, result in results.items()}
    baseline, estimate = exact[GAUSSIAN], lambda scores: bootstrap(scores, list(categories))
    four = best_of(results[GAUSSIAN].scores, 4, "shapes-match")["shapes-exact"] * 100
    plus = lambda gain: f"{'+' if gain.mean >= 0 else ''}{gain}"
    lines = [
        f"Exactly right pictures in %, held-out detector, {CAPTIONS} captions that no training saw x {SAMPLES} noises, "
        "1 network evaluation an image; mean over the six categories, 95 % intervals over captions, gains paired. "
        "Rewards alone, no reward gradients. Diversity: mean pairwise CLIP distance within a caption, Gaussian = 1. "
        "Training images include those of the stages before.",
        "",
        "| method | training images | seed 0 | seed 1 | seed 2 | pooled | gain | std of seeds | KL | diversity |",
        "|" + "---|" * 10,
        f"| Gaussian | 0 | | | | {estimate(baseline)} | | | 0 | 1.00 |",
        f"| Gaussian, best of 4 by the training reward (4 x the cost) | 0 | | | | {estimate(four)} | "
        f"{estimate(four).mean - estimate(baseline).mean:+.1f} | | 0 | |",
    ]
    bars = {GAUSSIAN: baseline}
    for stage in stages:
        names = [f"{stage} {seed}" for seed in SEEDS]
        stacked = np.stack([exact[name] for name in names])  # (seeds, P, S)
        each = [estimate(scores) for scores in stacked]
        bars[stage] = stacked.mean(0)
        lines.append(
            f"| {TITLES[stage]} | {images_of(stage, 0):,} | "
            + " | ".join(str(e) for e in each)
            + f" | {estimate(bars[stage])} | {plus(estimate(bars[stage] - baseline))} "
            + f"| {np.std([e.mean for e in each], ddof=1):.1f} "
            + f"| {np.mean([results[name].kl_to_gaussian for name in names]):.0f} "
            + f"| {np.mean([spread[name] for name in names]) / spread[GAUSSIAN]:.2f} |"
        )
    bars["best of 4"] = four
    lines += ["", "By category:", "", "| method | " + " | ".join(CATEGORIES) + " |", "|---" * 7 + "|"]
    for name, scores in bars.items():
        means = " | ".join(f"{scores[categories == category].mean():.1f}" for category in CATEGORIES)
        lines.append(f"| {TITLES.get(name, name)} | {means} |")
    lines += ["", f"Command: `python benchmarks/held_out.py --stages {' '.join(stages)}`. Evaluated at {provenance()}."]
    write_atomically(RESULTS / "held_out.md", "\n".join(lines) + "\n")
    picture(RESULTS / "held_out.png", bars, categories)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
