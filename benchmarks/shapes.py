"""Compares all ways of choosing the noise on `shapes-turbo`: validation captions, a held-out judge, and their costs.

    python benchmarks/shapes.py                     # train what is missing, evaluate, write the page
    python benchmarks/shapes.py --train 0           # train one seed and stop; several processes can share the seeds
    accelerate launch --num-processes 2 benchmarks/shapes.py --evaluate

The policies are those of ``held_out.py``; REINFORCE is trained as long as PPO, and NPNet on weak-to-strong pairs that
pass the filter of Golden Noise. Searches choose by ``shapes-match``, the training reward; ``shapes-exact`` is the
judge. Interrupted runs resume. Writes ``benchmarks/results/shapes.md`` and ``shapes.png``; ``noisear report
runs/shapes`` shows the images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import held_out  # in this folder
import matplotlib.pyplot as plt
import numpy as np
from seeds import SEEDS

from noisear_rl.algos import evaluate, npnet, reinforce
from noisear_rl.algos.evaluate import EvaluateConfig
from noisear_rl.data import pairs
from noisear_rl.evaluation.intervals import (
    bootstrap,
    category_mean,
    category_means,
    paired_difference,
    significance_mark,
    win_rate,
)
from noisear_rl.evaluation.results import Results, load_results
from noisear_rl.files import read_manifest, write_atomically
from noisear_rl.learning.run import read_records
from noisear_rl.report.plots import save_figure

RESULTS = Path(__file__).parent / "results"
CAPTIONS, SAMPLES = 240, 4
STAGES = {"NLL": "shared", "DPO": "dpo", "REINFORCE": "reinforce", "PPO": "ppo"}
SEARCHES = ("best-of-2", "best-of-4", "best-of-8", "search-8", "reno-8")
COMBINED = ("PPO+best-of-4", "PPO+search-4")


def train(seed: int) -> None:
    """Trains every method with one training seed; finished runs return immediately."""
    held_out.train(seed, ["shared", "dpo", "ppo"])
    at = lambda stage: held_out.folder_of(stage, seed)
    start = {"init_from": str(at("shared")), "seed": seed}
    preset = "reinforce_transfer.yaml"
    held_out.run(reinforce.train, reinforce.ReinforceConfig, preset, at("reinforce"), **start)
    first = {"seed": (seed + 1) * 10_000_000, "filter_reward": "shapes-match", "prompts": "train-balanced"}
    held_out.run(pairs.build_pairs, pairs.PairsConfig, "pairs.yaml", at("npnet-pairs"), **first)
    own = {"pairs": at("npnet-pairs"), "seed": seed}
    held_out.run(npnet.train, npnet.NPNetTrainingConfig, "npnet.yaml", at("npnet"), **own)


def evaluation(output_dir: Path) -> EvaluateConfig:
    """Returns the configuration of the evaluation."""
    paths = lambda stage: ",".join(str(held_out.folder_of(stage, seed)) for seed in SEEDS)
    trained = [f"{name}={paths(stage)}" for name, stage in STAGES.items()]
    return EvaluateConfig(
        methods=(f"NPNet={paths('npnet')}", *SEARCHES, *trained, *COMBINED),
        denoiser="shapes-turbo",
        num_prompts=CAPTIONS,
        samples=SAMPLES,
        seed=2_000_000,
        output_dir=output_dir,
    )


def images_of(group: str) -> int:
    """Returns the number of images denoised to train a method, from its first seed; 0 for searches."""
    name = group.split(" + ")[0]
    if name == "NPNet":  # the filter denoises both sides of a pair, with 8 network evaluations of the teacher each
        return 2 * read_manifest(held_out.folder_of("npnet-pairs", 0))["pairs"]
    if name == "REINFORCE":
        return held_out.images_of("shared", 0) + int(
            read_records(held_out.folder_of("reinforce", 0))[-1]["charts/images"]
        )
    return held_out.images_of(STAGES[name], 0) if name in STAGES else 0


def page(results: Results, command: str) -> str:
    """Formats the page of results as Markdown."""
    categories, judge = results.categories, results.judge
    baseline, seconds = results.methods[results.baseline], results.seconds_per_image()
    start = 100 * baseline.scores[judge]
    lines = [
        f"Exactly right images in %, held-out detector (`{judge}`), {len(results.prompts)} validation captions x "
        f"{results.samples} noises, mean over six categories. 95 % intervals over captions (scores averaged over "
        "training seeds first), gains paired; * excludes 0. NFE: network evaluations per image, including those of "
        "searches; `reno-8` also has 6 backward passes. Searches choose by the training reward. Diversity within a "
        "caption, by CLIP distance and by layout, Gaussian = 1. Seconds per image are a rough guide: other jobs ran "
        "at the same time.",
        "",
        "| method | training images | NFE | right | gain | by seed | std of seeds | wins % | CLIP distance | layout "
        "distance | KL | noise std | s per image |",
        "|---" * 13 + "|",
    ]
    for group, names in results.groups.items():
        members = [results.methods[name] for name in names]
        scores = 100 * results.pooled(group, judge)
        gain = paired_difference(scores, start, categories)
        own = [category_mean(100 * member.scores[judge], categories) for member in members]
        several = len(members) > 1
        wins = np.mean([win_rate(member.scores[judge], baseline.scores[judge]) for member in members], axis=0)
        ratio = lambda key, members=members: (
            f"{np.mean([m.diversity[key].mean() for m in members]) / baseline.diversity[key].mean():.2f}"
        )
        kls = [member.kl_to_gaussian for member in members]
        cells = [
            group,
            f"{images_of(group):,}",
            f"{members[0].nfe:g}",
            str(bootstrap(scores, categories)),
            "" if group == results.baseline else gain.text(1, "+") + significance_mark(gain),
            ", ".join(f"{value:.1f}" for value in own) if several else "",
            f"{np.std(own, ddof=1):.1f}" if several else "",
            f"{100 * category_mean(wins, categories):.1f}",
            ratio("shapes-clip"),
            ratio("layout"),
            "" if None in kls else f"{np.mean([kl for kl in kls if kl is not None]):.0f}",
            f"{np.mean([member.noise_std for member in members]):.2f}",
            f"{np.mean([seconds[name] for name in names]):.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Paired comparisons at equal cost:", ""]
    for one, other in (("PPO", "REINFORCE"), ("PPO", "DPO"), ("PPO", "NPNet"), ("PPO + best of 4", "best of 4")):
        scores, baseline_scores = (100 * results.pooled(group, judge) for group in (one, other))
        difference = paired_difference(scores, baseline_scores, categories)
        lines.append(f"- {one} against {other}: {difference.text(1, '+')}{significance_mark(difference)}")
    order = list(dict.fromkeys(categories))
    lines += ["", "By category:", "", "| method | " + " | ".join(order) + " |", "|---" * (len(order) + 1) + "|"]
    for group in results.groups:
        means = category_means(100 * results.pooled(group, judge), categories)
        lines.append(f"| {group} | " + " | ".join(f"{means[name]:.1f}" for name in order) + " |")
    lines += ["", f"Command: `{command}`. {results.provenance}."]
    return "\n".join(lines)


def chart(path: Path, results: Results) -> None:
    """Plots the percentage of right images against cost and against diversity."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), dpi=110, sharey=True)
    baseline = results.methods[results.baseline]
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for i, (group, names) in enumerate(results.groups.items()):
        members = [results.methods[name] for name in names]
        estimate = bootstrap(100 * results.pooled(group, results.judge), results.categories)
        spread = np.mean([m.diversity["shapes-clip"].mean() for m in members])
        spread /= baseline.diversity["shapes-clip"].mean()
        for axes, x in zip(panels, (members[0].nfe, spread), strict=True):
            bars = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
            axes.errorbar([x], [estimate.mean], bars, fmt="o", capsize=3, color=colors[i % 20], label=group)
    panels[0].set(xscale="log", xlabel="network evaluations per image", ylabel="exactly right, %")
    panels[0].set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    panels[0].minorticks_off()
    panels[1].set(xlabel="diversity within a caption, Gaussian = 1")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle("Validation captions, held-out judge, three training seeds, 95 % intervals", fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, choices=SEEDS, help="train one seed and stop")
    parser.add_argument("--evaluate", action="store_true", help="evaluate without training")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/shapes"), help="folder for images and scores")
    arguments = parser.parse_args()
    if not arguments.evaluate:
        for seed in SEEDS if arguments.train is None else [arguments.train]:
            train(seed)
        if arguments.train is not None:
            return
    if not evaluate.run(evaluation(arguments.output_dir)):
        return  # not the main process
    results = load_results(arguments.output_dir)
    text = page(results, "python benchmarks/shapes.py")
    write_atomically(RESULTS / "shapes.md", text + "\n")
    chart(RESULTS / "shapes.png", results)
    print(text)


if __name__ == "__main__":
    main()
