"""Compares all ways of choosing the noise on `shapes-turbo`, on captions of the test split, by a held-out judge.

    python benchmarks/shapes.py                     # train what is missing, evaluate, write the page
    python benchmarks/shapes.py --train 0           # train one seed and stop; several processes can share the seeds
    torchrun --nproc-per-node 2 benchmarks/shapes.py --evaluate
    python benchmarks/shapes.py --render            # the page again from its data

Policies are trained by ``noisear train-prior`` with ``configs/shapes/prior.yaml``, whose settings were chosen on
validation captions. PPO is run twice from the same pretrained policy: as the preset says, and with a tenth of the
images. With three of the training seeds, the other algorithms get as many images as the latter, whose policies are
also evaluated at higher layout temperatures, and ``configs/shapes/prior_small.yaml`` is run, too. The policies of both
presets are also evaluated at a lower temperature, which is right more often, and at higher ones, which keep more
diversity. Searches choose by ``shapes-match``, the training reward;
``shapes-exact`` is the judge, which no training and no choice has used. Interrupted runs resume. Writes ``shapes.md``,
``shapes.png`` and the scores behind them, ``shapes.json.gz``, in ``benchmarks/results``; ``noisear report
runs/shapes/evaluation`` shows the images.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from gaussian import figure  # in this folder
from pages import by_seed  # in this folder

from noisear_rl.algos import dpo, evaluate, nll, ppo, prior, reinforce, reward_gradient
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.algos.evaluate import EvaluateConfig
from noisear_rl.config import load_yaml
from noisear_rl.data.pairs import PairsConfig, build_pairs
from noisear_rl.evaluation.intervals import bootstrap, category_means, holm, paired_difference, significance_mark
from noisear_rl.evaluation.results import Results, from_record, load_results, read_record, to_record, write_page
from noisear_rl.files import read_manifest
from noisear_rl.learning.records import read_records
from noisear_rl.report.plots import save_figure

ROOT = Path(__file__).parents[1]
RUNS, PAGE = Path("runs/shapes"), ROOT / "benchmarks/results/shapes.md"
TURBO = "NoiseAR-ShapesTurbo-v0"
SEEDS = (0, 1, 2, 3, 4)
CAPTIONS, SAMPLES = 240, 4
STAGES = {"shared noise, no policy": "shared", "NLL on shared layouts": "nll", "PPO from there": "ppo"}
LONGER, LONG = "PPO with ten times the images", "ppo_long"
PRESETS = {LONGER: LONG, "NLL, small preset": "small/nll", "PPO, small preset": "small/ppo"}
OTHERS = {
    "REINFORCE from there": "reinforce",
    "DPO from there": "dpo",
    "expert iteration from there": "expert",
    "reward gradient from there": "reward_gradient",
}
OTHER_SEEDS = (0, 1, 2)
WARMER = (1.0, 2.0)  # layout temperatures of PPO's policies beside their own
KNOBS = (  # temperature and layout temperature of the presets' policies, chosen on validation captions
    ("", None, None),
    (", temperature 0.8", 0.8, None),
    (", temperature 1.25 and layout temperature 2", 1.25, 2.0),
)
IMAGES = 16_384  # of PPO and of each of the others
SHORT: dict[str, Any] = {"prompts_per_update": 128, "updates": IMAGES // 1024, "step": "adaptive", "target_kl": 2.0}
SHORT |= {"epochs": 2, "cg_iterations": 8, "fisher_episodes": 128, "save_every": 8}
SEARCHES = ("best-of-2", "best-of-4", "best-of-8")


def folder_of(seed: int) -> Path:
    """Returns the folder of one training seed."""
    return RUNS / f"seed-{seed}"


def train(seed: int) -> None:
    """Trains with one training seed; finished stages return immediately."""
    config = load_yaml(prior.PriorConfig, ROOT / "configs/shapes/prior.yaml")
    prior.train(replace(config, output_dir=folder_of(seed), seed=seed, ppo=replace(config.ppo, **SHORT)))
    start = str(folder_of(seed) / "nll")  # the preset's PPO, from the same pretrained policy
    ppo.train(replace(config.ppo, init_from=start, output_dir=folder_of(seed) / LONG, seed=seed, resume=True))
    if seed in OTHER_SEEDS:
        small = load_yaml(prior.PriorConfig, ROOT / "configs/shapes/prior_small.yaml")
        prior.train(replace(small, output_dir=folder_of(seed) / "small", seed=seed))
        train_others(folder_of(seed), seed)


def train_others(folder: Path, seed: int) -> None:
    """Improves the pretrained policy of a training seed by each of the other algorithms."""
    start = str(folder / "nll")
    common: dict[str, Any] = {"init_from": start, "seed": seed, "resume": True}
    reinforce.train(
        reinforce.ReinforceConfig(
            env_id=TURBO,
            prompts="train-balanced",
            prompts_per_update=128,
            samples_per_prompt=8,
            updates=IMAGES // 1024,
            output_dir=folder / "reinforce",
            cg_iterations=8,
            fisher_episodes=128,
            **common,
        )
    )
    per_prompt = 16
    prompts: dict[str, Any] = {"prompts": "train-balanced", "num_prompts": IMAGES // per_prompt}
    rollouts = folder / "rollouts"
    collect(
        CollectConfig(TURBO, policy=start, output_dir=rollouts, seed=seed, samples_per_prompt=per_prompt, **prompts)
    )
    preferences = load_yaml(dpo.DPOConfig, ROOT / "configs/shapes/dpo.yaml")
    dpo.train(replace(preferences, rollouts=rollouts, output_dir=folder / "dpo", **common))
    build_pairs(
        PairsConfig(
            "shapes-turbo",
            "signal_leak",
            "train-balanced",
            folder / "leaks",
            pairs=IMAGES,
            filter_reward="shapes-match",
            policy=start,
            signal_strength=2.0,
            noise_scale=0.75,
            seed=1_000_000 * (1 + seed),
        )
    )
    pretraining = load_yaml(prior.PriorConfig, ROOT / "configs/shapes/prior.yaml").nll
    pretraining = replace(pretraining, epochs=20, learning_rate=5e-4, **common)
    nll.train(replace(pretraining, pairs=folder / "leaks", output_dir=folder / "expert"))
    reward_gradient.train(
        reward_gradient.RewardGradientConfig(
            prompts="train-balanced",
            updates=IMAGES // 128,
            learning_rate=1e-4,
            kl_prior_coef=0.0,  # as the others have none
            output_dir=folder / "reward_gradient",
            **common,
        )
    )


def paths(stage: str) -> str:
    """Returns the folders of a stage, one per training seed, as a method of ``noisear evaluate`` names them."""
    seeds = OTHER_SEEDS if stage in (*OTHERS.values(), "small/nll", "small/ppo") else SEEDS
    return ",".join(str(folder_of(seed) / stage) for seed in seeds)


def evaluation() -> EvaluateConfig:
    """Returns the configuration of the evaluation."""
    return EvaluateConfig(
        methods=(*SEARCHES, *(f"{name}={paths(stage)}" for name, stage in (STAGES | OTHERS).items())),
        denoiser="shapes-turbo",
        prompts="test",
        num_prompts=CAPTIONS,
        samples=SAMPLES,
        seed=2_000_000,
        output_dir=RUNS / "evaluation",
    )


def warmer(temperature: float) -> EvaluateConfig:
    """Returns the configuration of the evaluation of PPO's policies at another layout temperature."""
    return replace(
        evaluation(),
        methods=(f"PPO, layout temperature {temperature:g}={paths('ppo')}",),
        layout_temperature=temperature,
        output_dir=RUNS / f"evaluation-{temperature:g}",
    )


def presets(suffix: str, temperature: float | None, layout_temperature: float | None) -> EvaluateConfig:
    """Returns the configuration of the evaluation of the presets' policies, at their own temperatures or others."""
    return replace(
        evaluation(),
        methods=tuple(f"{name}{suffix}={paths(stage)}" for name, stage in PRESETS.items()),
        temperature=temperature,
        layout_temperature=layout_temperature,
        output_dir=RUNS / f"evaluation-presets-{temperature or 1:g}",
    )


def evaluations() -> tuple[EvaluateConfig, ...]:
    """Returns the configurations of all evaluations, which have captions and seeds in common."""
    return evaluation(), *(presets(*knobs) for knobs in KNOBS), *(warmer(temperature) for temperature in WARMER)


def load_all() -> Results:
    """Returns the results of all evaluations as one."""
    found, *others = (load_results(config.output_dir) for config in evaluations())
    for other in others:
        found = replace(found, methods=found.methods | other.methods)
    return found


def before_ppo(folder: Path) -> tuple[int, int]:
    """Returns the number of images to try noises with and, at most, to leak layouts, of a prior in a folder."""
    return read_manifest(folder / "tried")["rollouts"], read_manifest(folder / "shared")["leaked"]


def training_images() -> dict[str, int]:
    """Returns the number of images denoised to train each method, at most, from the first seed."""
    folder = folder_of(SEEDS[0])
    own = lambda stage: int(read_records(folder / stage)[-1]["charts/images"])
    tried, leaked = before_ppo(folder)
    images = dict(zip(STAGES, (tried, tried + leaked, tried + leaked + own("ppo")), strict=True))
    small = sum(before_ppo(folder / "small"))
    own_presets = dict(zip(PRESETS, (tried + leaked + own(LONG), small, small + own("small/ppo")), strict=True))
    images |= {f"{name}{suffix}": count for name, count in own_presets.items() for suffix, *_ in KNOBS}
    same = [*OTHERS, *(f"PPO, layout temperature {temperature:g}" for temperature in WARMER)]
    return images | dict.fromkeys(same, tried + leaked + IMAGES)


def curves() -> list[list[tuple[int, float]]]:
    """Returns the training reward of the preset's PPO against all images denoised so far, by training seed."""
    start = training_images()["NLL on shared layouts"]
    logs = [read_records(folder_of(seed) / LONG) for seed in SEEDS]
    return [[(start + int(r["charts/images"]), round(r["charts/episodic_return"], 4)) for r in log] for log in logs]


def table(record: dict[str, Any]) -> str:
    """Formats the page as Markdown, with the figure of Gaussian noise from ``gaussian.json``."""
    results = from_record(record, RUNS)
    noise = figure(read_record(PAGE.with_name("gaussian.json")), results.denoiser, ("test",))
    prompts, categories, judge = results.prompts, results.categories, results.judge
    baseline = results.methods[results.baseline]
    start = 100 * baseline.scores[judge]
    score = {group: 100 * results.by_seed(group, judge) for group in results.groups}
    others = [group for group in results.groups if group != results.baseline]
    gains = holm([paired_difference(score[group], start, categories, prompts=prompts) for group in others])
    gain = {
        group: estimate.text(1, "+") + significance_mark(estimate)
        for group, estimate in zip(others, gains, strict=True)
    }
    lines = [
        f"Exactly right images in %, held-out detector (`{judge}`), {len(prompts)} captions of the test split "
        f"({len(set(prompts))} distinct ones; small categories repeat theirs with other noise) x {results.samples} "
        "noises, mean over six categories. 95 % intervals over distinct captions and training seeds, gains paired with "
        "Gaussian noise of the same seeds; * excludes 0, corrected by Holm's method. NFE: network evaluations per "
        "image, including those of searches, which choose by the training reward. Diversity within a caption, "
        f"Gaussian = 1. Gaussian noise: first the figure of `gaussian.md`, {noise.images:,} images of captions of the "
        "test split, then the images compared here.",
        "",
        "| method | training images, at most | NFE | right | gain | by seed | CLIP distance | layout distance "
        "| KL, nats | noise std |",
        "|---" * 10 + "|",
    ]
    for group, names in results.groups.items():
        members = [results.methods[name] for name in names]
        ratio = lambda key, members=members: (
            f"{np.mean([m.diversity[key].mean() for m in members]) / baseline.diversity[key].mean():.2f}"
        )
        kls = [member.kl_to_gaussian for member in members if member.kl_to_gaussian is not None]
        cells = [
            group,
            f"{results.facts['images'].get(group, 0):,}",
            f"{members[0].nfe:g}",
            (f"{noise.right}; here " if group == results.baseline else "")
            + str(bootstrap(score[group], categories, prompts=prompts)),
            gain.get(group, ""),
            by_seed(score[group], categories, prompts),
            ratio("shapes-clip"),
            ratio("layout"),
            f"{np.mean(kls):.0f}" if kls else "",
            f"{np.mean([member.noise_std for member in members]):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    order = list(dict.fromkeys(categories))
    distinct = {name: len({p for p, c in zip(prompts, categories, strict=True) if c == name}) for name in order}
    lines += ["", "By category (distinct captions):", ""]
    lines += [
        "| method | " + " | ".join(f"{name} ({distinct[name]})" for name in order) + " |",
        "|---" * (len(order) + 1) + "|",
    ]
    for group in results.groups:
        means = category_means(score[group].mean(0), categories, prompts)
        lines.append(f"| {group} | " + " | ".join(f"{means[name]:.1f}" for name in order) + " |")
    lines += ["", f"Command: `python benchmarks/shapes.py`. Evaluated at {results.provenance}."]
    return "\n".join(lines) + "\n"


def chart(path: Path, results: Results) -> None:
    """Plots the percentage of right images against cost and diversity, and the reward of PPO against images."""
    figure, (*panels, last) = plt.subplots(1, 3, figsize=(13, 5.4), dpi=110)
    baseline = results.methods[results.baseline]
    for i, (group, names) in enumerate(results.groups.items()):
        members = [results.methods[name] for name in names]
        scores = 100 * results.by_seed(group, results.judge)
        estimate = bootstrap(scores, results.categories, prompts=results.prompts)
        spread = np.mean([m.diversity["layout"].mean() for m in members]) / baseline.diversity["layout"].mean()
        for axes, x in zip(panels, (members[0].nfe, spread), strict=True):
            bars = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
            marker = "o^s"[i // 10]
            axes.errorbar([x], [estimate.mean], bars, fmt=marker, capsize=3, color=f"C{i % 10}", label=group)
    panels[0].set(xscale="log", xlabel="network evaluations per image", ylabel="exactly right, %")
    panels[0].set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    panels[0].minorticks_off()
    panels[1].set(xlabel="diversity of layouts within a caption, Gaussian = 1", ylim=panels[0].get_ylim())
    for seed, points in enumerate(results.facts["curves"]):
        images, rewards = np.array(points).T
        last.plot(
            images / 1000,
            rewards,
            color=f"C{list(results.groups).index(LONGER)}",
            alpha=0.7,
            lw=1,
            label=f"seed {seed}",
        )
    last.set(xlabel="thousands of images denoised for training", ylabel="PPO: reward on training captions")
    for axes in (*panels, last):
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="lower center", ncols=3)
    figure.suptitle(
        "Left and centre: test captions, held-out judge, 95 % intervals over captions and training seeds", fontsize=10
    )
    figure.tight_layout(rect=(0, 0.3, 1, 1))
    save_figure(figure, path)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, choices=SEEDS, help="train one seed and stop")
    parser.add_argument("--evaluate", action="store_true", help="evaluate without training")
    parser.add_argument("--render", action="store_true", help="write the page again from its data and stop")
    arguments = parser.parse_args()
    record = None
    if not arguments.render:
        for seed in () if arguments.evaluate else SEEDS if arguments.train is None else [arguments.train]:
            train(seed)
        if arguments.train is not None:
            return
        for config in evaluations():
            done = evaluate.run(config)
        if not done:
            return  # not the main process
        record = to_record(replace(load_all(), facts={"images": training_images(), "curves": curves()}))
    print(write_page(PAGE, table, record))
    chart(PAGE.with_suffix(".png"), from_record(read_record(PAGE.with_suffix(".json")), RUNS))


if __name__ == "__main__":
    main()
