"""Does a learned prior help on validation captions? Pretraining, PPO and DPO, three training seeds, held-out judge.

    python benchmarks/held_out.py                # train what is missing, then evaluate
    python benchmarks/held_out.py --train 0      # train one seed and stop; several processes can share the seeds
    python benchmarks/held_out.py --methods shared ppo

Every stage is a shipped preset (``configs/shapes``) with the training seed set. ``leak``: NLL on signal-leak pairs.
``shared``: tries 384 captions with the same 128 noises, then NLL on the eight noises that serve all captions best.
``ppo`` and ``dpo`` start from ``shared``. Runs go to ``runs/held_out``; interrupted runs resume. Writes
``benchmarks/results/held_out.md``, ``held_out.png`` and ``held_out_curves.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from seeds import HEAD, SEEDS, baseline_rows, seeds_row, signed  # in this folder

from noisear_rl.algos import collect, dpo, nll, ppo
from noisear_rl.checkpoints import list_checkpoints
from noisear_rl.config import load_yaml
from noisear_rl.data import pairs, shared_noise
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import CATEGORIES, balanced_captions
from noisear_rl.evaluation.compare import MethodScores, best_of, evaluate
from noisear_rl.evaluation.diversity import diversity
from noisear_rl.evaluation.intervals import bootstrap
from noisear_rl.files import read_manifest, write_atomically
from noisear_rl.learning.run import read_records
from noisear_rl.policy import NoiseARPolicy, load_policy
from noisear_rl.provenance import provenance
from noisear_rl.report.plots import save_figure
from noisear_rl.rewards import load_reward
from noisear_rl.rewards.shapes import ShapesClip
from noisear_rl.samplers import GAUSSIAN

ROOT = Path(__file__).parents[1]
RUNS, RESULTS = Path("runs/held_out"), ROOT / "benchmarks/results"
PRESETS = ROOT / "configs/shapes"
CAPTIONS, SAMPLES = 240, 8
SCORERS = {"shapes-exact": 1.0, "shapes-match": 1.0}
COLD = 0.5  # the temperature at which the authors of the paper sample
TITLES = {
    "leak": "NLL on signal-leak pairs",
    "shared": "NLL on shared noises",
    "dpo": "… then DPO on its rollouts",
    "ppo": "… then PPO",
    "cold": f"… then PPO, sampled at temperature {COLD}",
}
METHODS = ("leak", "shared", "dpo", "ppo")
COLORS = dict(zip((GAUSSIAN, *TITLES), ("0.6", "#92c5de", "#4393c3", "#5aae61", "#d6604d", "#b2182b"), strict=True))
COLORS["best of 4"] = "0.3"


def folder_of(stage: str, seed: int) -> Path:
    """Returns the run folder of a stage."""
    return RUNS / f"{stage}-seed-{seed}"


def run(train: Callable[[Any], Any], cls: type, preset: str, folder: Path, **options: Any) -> None:
    """Runs a shipped preset with some options set; a finished run returns immediately."""
    if "resume" in {field.name for field in dataclasses.fields(cls)}:
        options["resume"] = True
    train(dataclasses.replace(load_yaml(cls, PRESETS / preset), output_dir=folder, **options))


def train(seed: int, methods: list[str]) -> None:
    """Runs the stages of one training seed."""
    at = lambda stage: folder_of(stage, seed)
    if "leak" in methods:
        first = (seed + 1) * 10_000_000
        run(pairs.build_pairs, pairs.PairsConfig, "signal_leak.yaml", at("leak-pairs"), seed=first)
        run(nll.train, nll.NLLConfig, "nll_signal_leak.yaml", at("leak"), pairs=at("leak-pairs"), seed=seed)
    if not {"shared", "ppo", "dpo"} & set(methods):
        return
    run(collect.collect, collect.CollectConfig, "collect_same_noise.yaml", at("tried"), seed=seed)
    chosen = {"rollouts": at("tried")}
    run(shared_noise.build_pairs, shared_noise.SharedNoiseConfig, "shared_noise.yaml", at("shared-pairs"), **chosen)
    run(nll.train, nll.NLLConfig, "nll_shared_noise.yaml", at("shared"), pairs=at("shared-pairs"), seed=seed)
    start = str(at("shared"))
    if "dpo" in methods:
        run(collect.collect, collect.CollectConfig, "collect.yaml", at("rollouts"), policy=start, seed=seed)
        run(dpo.train, dpo.DPOConfig, "dpo.yaml", at("dpo"), rollouts=at("rollouts"), init_from=start, seed=seed)
    if "ppo" in methods:
        run(ppo.train, ppo.PPOConfig, "ppo_transfer.yaml", at("ppo"), init_from=start, seed=seed)


def images_of(method: str, seed: int) -> int:
    """Returns the number of images denoised to train a policy, including those of earlier stages."""
    if method == "leak":
        made = read_manifest(folder_of("leak-pairs", seed))
        return made["pairs"] * made["rounds"]
    total = read_manifest(folder_of("tried", seed))["rollouts"]
    if method == "dpo":
        total += read_manifest(folder_of("rollouts", seed))["rollouts"]
    if method in ("ppo", "cold"):
        total += int(read_records(folder_of("ppo", seed))[-1]["charts/images"])
    return total


def policy_of(method: str, seed: int) -> NoiseARPolicy:
    """Loads a trained policy; ``cold`` is the PPO policy at a lower temperature."""
    policy = load_policy(folder_of("ppo" if method == "cold" else method, seed))
    if method == "cold":
        policy.config = dataclasses.replace(policy.config, temperature=COLD)
    return policy


def bar_chart(path: Path, bars: dict[str, np.ndarray], categories: np.ndarray) -> None:
    """Plots the percentage of right images by category; ``bars`` holds scores ``(P, …)`` in % by method."""
    figure, axes = plt.subplots(figsize=(10, 3.4), dpi=110)
    width = 0.8 / len(bars)
    for i, (name, scores) in enumerate(bars.items()):
        means = [scores[categories == category].mean() for category in CATEGORIES]
        where = np.arange(len(means) + 1) + (i - (len(bars) - 1) / 2) * width
        label = {GAUSSIAN: "Gaussian noise", "best of 4": "Gaussian, best of 4 (4 x the cost)"}.get(name)
        axes.bar(where, [*means, np.mean(means)], width, color=COLORS[name], label=label or TITLES[name])
    axes.set_xticks(range(len(CATEGORIES) + 1), [*(c.replace("_", " ") for c in CATEGORIES), "mean"])
    axes.set(ylabel="exactly right, %", ylim=(0, 100), title="Validation captions, held-out judge, 3 seeds")
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)


def curves(path: Path, rows: list[tuple[int, float, float, float]], gaussian: float) -> None:
    """Plots the PPO checkpoints of the first seed: right images against training images, diversity against KL."""
    images, right, kl, spread = (np.array(column) for column in zip(*rows, strict=True))
    figure, (left, middle) = plt.subplots(1, 2, figsize=(9, 3.2), dpi=110)
    left.plot(images, right, "o-", color=COLORS["ppo"])
    left.axhline(gaussian, color="0.5", linestyle="--", linewidth=1, label="Gaussian noise")
    left.set(xlabel="training images", ylabel="exactly right, %", title="validation captions during PPO")
    left.legend(frameon=False)
    middle.plot(kl, spread, "o-", color=COLORS["ppo"])
    middle.set(xlabel="KL to N(0, I), nats per noise", ylabel="diversity, Gaussian = 1", ylim=(0, 1.05))
    for axes in (left, middle):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, choices=SEEDS, help="train one seed and stop")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to include")
    arguments = parser.parse_args()
    for seed in SEEDS if arguments.train is None else [arguments.train]:
        train(seed, arguments.methods)
    if arguments.train is not None:
        return

    captions = balanced_captions("validation", CAPTIONS)
    prompts, categories = [c.text for c in captions], np.array([c.category for c in captions])
    shown = [name for name in TITLES if name in arguments.methods or (name == "cold" and "ppo" in arguments.methods)]
    policies = {f"{method} {seed}": policy_of(method, seed) for method in shown for seed in SEEDS}
    checkpoints = list_checkpoints(folder_of("ppo", 0)) if "ppo" in shown else []
    along = {checkpoint.name: load_policy(checkpoint) for checkpoint in checkpoints}
    denoiser, reward = load_denoiser("shapes-turbo"), load_reward(SCORERS)
    methods = {GAUSSIAN: None} | policies | along
    results = evaluate(denoiser, reward, methods, prompts, SAMPLES, seed=2_000_000, keep_images=SAMPLES)
    report(results, categories, shown, list(along))


def report(results: dict[str, MethodScores], categories: np.ndarray, shown: list[str], along: list[str]) -> None:
    """Writes the table and the figures."""
    embed = ShapesClip().embed
    with torch.no_grad():
        spread = {name: float(diversity(result.images, embed).mean()) for name, result in results.items()}
    exact = {name: result.scores["shapes-exact"] * 100 for name, result in results.items()}
    baseline, estimate = exact[GAUSSIAN], lambda scores: bootstrap(scores, list(categories))
    four = best_of(results[GAUSSIAN].scores, 4, "shapes-match")["shapes-exact"] * 100
    lines = [
        f"Exactly right images in %, held-out detector, {CAPTIONS} validation captions x {SAMPLES} noises, "
        "1 network evaluation per image; mean over the six categories, 95 % intervals over captions, gains paired. "
        "Training uses rewards only, no reward gradients. Diversity: mean pairwise CLIP distance within a caption, "
        "Gaussian = 1. Training images include those of earlier stages.",
        "",
        HEAD,
        *baseline_rows(estimate(baseline), estimate(four)),
    ]
    bars = {GAUSSIAN: baseline}
    for method in shown:
        names = [f"{method} {seed}" for seed in SEEDS]
        stacked = np.stack([exact[name] for name in names])  # (seeds, P, S)
        bars[method] = stacked.mean(0)
        kl = float(np.mean([results[name].kl_to_gaussian for name in names]))
        ratio = float(np.mean([spread[name] for name in names])) / spread[GAUSSIAN]
        lines.append(seeds_row(TITLES[method], images_of(method, 0), stacked, baseline, estimate, kl, ratio))
    bars["best of 4"] = four
    lines += ["", "By category:", "", "| method | " + " | ".join(CATEGORIES) + " |", "|---" * 7 + "|"]
    for name, scores in bars.items():
        means = " | ".join(f"{scores[categories == category].mean():.1f}" for category in CATEGORIES)
        lines.append(f"| {TITLES.get(name, name)} | {means} |")
    for method in ("shared", "ppo", "dpo", "cold"):
        if method in shown:
            behind = estimate(bars[method].mean(1, keepdims=True) - four.mean(1, keepdims=True))
            lines += ["", f"{TITLES[method].removeprefix('… then ')} against best of 4, paired: {signed(behind)}."]
    if "dpo" in shown:
        accuracies = [read_records(folder_of("dpo", seed))[-1]["eval/rewards/accuracies"] * 100 for seed in SEEDS]
        count = len(load_rollouts(folder_of("rollouts", 0)).dataset)
        accuracy = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        lines += ["", f"DPO: {count:,} rollouts; accuracy on pairs of held-out prompts in %, by seed: {accuracy}."]
    if along:
        lines += [
            "",
            "PPO checkpoints, first seed:",
            "",
            "| training images | right | KL | diversity |",
            "|---" * 4 + "|",
        ]
        images_at = {record["step"]: record["charts/images"] for record in read_records(folder_of("ppo", 0))}
        rows = []
        for name in [name for name in ("shared 0", *along) if name in results]:
            images = images_of("shared", 0) + (0 if name == "shared 0" else int(images_at[int(name.split("-")[1])]))
            right, kl, ratio = estimate(exact[name]), results[name].kl_to_gaussian, spread[name] / spread[GAUSSIAN]
            rows.append((images, right.mean, kl, ratio))
            lines.append(f"| {images:,} | {right} | {kl:.0f} | {ratio:.2f} |")
        curves(RESULTS / "held_out_curves.png", rows, estimate(baseline).mean)
    command = f"python benchmarks/held_out.py --methods {' '.join(name for name in shown if name != 'cold')}"
    lines += ["", f"Command: `{command}`. Evaluated at {provenance()}."]
    write_atomically(RESULTS / "held_out.md", "\n".join(lines) + "\n")
    bar_chart(RESULTS / "held_out.png", bars, categories)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
