"""Which choices make policy gradients work here? One change at a time, reward against images, three training seeds.

    python benchmarks/what_works.py                  # train what is missing, then evaluate
    python benchmarks/what_works.py --train 0 2      # train every second run and stop; for two processes: `0 2`, `1 2`
    python benchmarks/what_works.py --render         # the page again from its data

Six hard captions (two per category of ``benchmarks/hard_captions.txt``), 6,144 images per run. Each variant changes one
thing in the base: REINFORCE with natural-gradient steps, 16 updates of 2 nats on 64 noises per caption. Runs go to
``runs/what_works``; interrupted runs resume. Writes ``what_works.md``, the scores behind it and a figure,
``what_works.json`` and ``.png``, in ``benchmarks/results``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import shared_noises  # in this folder
from pages import RESULTS, SEEDS, markdown, page, seed_spread, signed, train_variants, write

from noisear_rl.algos import ppo, reinforce
from noisear_rl.denoisers import load_denoiser
from noisear_rl.evaluation.compare import as_results, evaluate
from noisear_rl.evaluation.intervals import bootstrap, holm, paired_difference, significance_mark
from noisear_rl.evaluation.results import from_record, to_record
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, load_policy
from noisear_rl.prompts import categories_of
from noisear_rl.report.plots import save_figure
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import GAUSSIAN

RUNS = Path("runs/what_works")
PROMPTS = tuple((Path(__file__).parent / "hard_captions.txt").read_text().splitlines()[:6])
SAMPLES = 64
BASE: dict[str, Any] = {
    "env_id": "NoiseAR-ShapesTurbo-v0",
    "prompts": PROMPTS,
    "prompts_per_update": 6,
    "samples_per_prompt": 64,
    "updates": 16,
    "target_kl": 2.0,
    "save_every": 8,
}


@dataclass(frozen=True)
class Variant:
    """One change of the base.

    Attributes:
        change: What is changed.
        setting: Its new value.
        options: Differences from :data:`BASE`.
        policy: Differences from a policy with fixed log-variance.
        algorithm: ``reinforce`` or ``ppo``.
    """

    change: str
    setting: str
    options: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    algorithm: Literal["reinforce", "ppo"] = "reinforce"


VARIANTS = {
    "base": Variant("base", "REINFORCE, natural-gradient steps of 2 nats, leave-one-out baseline, fixed log-variance"),
    "adam": Variant("optimiser", "Adam at 2e-4", {"optimizer": "adam"}),
    "kl-0.5": Variant("step size", "0.5 nats", {"target_kl": 0.5}),
    "kl-6": Variant("step size", "6 nats", {"target_kl": 6.0}),
    "small-batch": Variant(
        "images per step", "16 noises per caption, 64 updates of 2 nats", {"samples_per_prompt": 16, "updates": 64}
    ),
    "small-batch-small-step": Variant(
        "images per step",
        "16 noises per caption, 64 updates of 0.5 nats",
        {"samples_per_prompt": 16, "updates": 64, "target_kl": 0.5},
    ),
    "no-baseline": Variant("baseline", "none", {"advantage": "none"}),
    "shared-variance": Variant(
        "log-variance", "learned, one number per patch position", {}, {"log_variance": "shared"}
    ),
    "sinusoidal": Variant("position features", "sinusoidal", {}, {"positions": "sinusoidal"}),
    "clip-reward": Variant("reward", "CLIP similarity instead of the dense match", {"reward": "shapes-clip"}),
    "shared-noise": Variant(
        "start",
        "NLL on shared noises (`shared_noises.py`; its 49,152 images are not counted here)",
    ),
    "ppo": Variant("algorithm", "PPO, 2 epochs, clip range 0.5", {}, {}, "ppo"),
    "ppo-critic": Variant("algorithm", "PPO, critic and GAE", {"advantage": "gae"}, {}, "ppo"),
    "ppo-adam": Variant(
        "algorithm",
        "PPO, Adam at 2e-4, 4 epochs of 4 minibatches",
        {"optimizer": "adam", "epochs": 4, "minibatches": 4},
        {},
        "ppo",
    ),
}
SHOWN = {"base": "#2166ac", "ppo": "#b2182b", "adam": "#4dac26", "ppo-adam": "#b8860b", "small-batch": "#762a83"}


def folder_of(name: str, seed: int) -> Path:
    """Returns the folder of a run."""
    return RUNS / f"{name}-seed-{seed}"


def train(name: str, seed: int) -> None:
    """Trains one variant with one training seed; a finished run returns immediately."""
    variant = VARIANTS[name]
    policy = dataclasses.replace(NoiseARConfig(log_variance="fixed"), **variant.policy)
    options = BASE | variant.options | {"policy": policy, "seed": seed, "resume": True}
    if name == "shared-noise":
        shared_noises.train(seed)
        options["init_from"] = str(shared_noises.policy_folder(seed))
    if variant.algorithm == "ppo":
        ppo.train(ppo.PPOConfig(output_dir=folder_of(name, seed), **options))
    else:
        reinforce.train(reinforce.ReinforceConfig(output_dir=folder_of(name, seed), **options))


def curves(path: Path, gaussian: float) -> None:
    """Plots the reward against training images: the mean over seeds, and the band from the lowest to the highest."""
    figure, axes = plt.subplots(figsize=(7.5, 4), dpi=110)
    for name, color in SHOWN.items():
        runs = [read_records(folder_of(name, seed)) for seed in SEEDS]
        images = np.array([record["charts/images"] for record in runs[0]])
        rewards = np.array([[record["reward/shapes-match"] for record in run] for run in runs])
        width = max(1, len(images) // 16)  # small batches are noisy
        kernel = np.ones(width) / width
        rewards = np.stack([np.convolve(run, kernel, "valid") for run in rewards])
        images = images[width - 1 :]
        label = "REINFORCE, natural gradient" if name == "base" else VARIANTS[name].setting
        axes.plot(images, rewards.mean(0), color=color, linewidth=2, label=label)
        axes.fill_between(images, rewards.min(0), rewards.max(0), color=color, alpha=0.15, linewidth=0)
    axes.axhline(gaussian, color="0.5", linestyle="--", linewidth=1, label="Gaussian noise")
    axes.set(xlabel="training images", ylabel="reward (shapes-match)", title="6 hard captions, 3 seeds")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)


def measure() -> dict[str, Any]:
    """Returns the scores of every run."""
    policies: dict[str, NoiseARPolicy | None] = {GAUSSIAN: None}
    policies |= {f"{name} {seed}": load_policy(folder_of(name, seed)) for name in VARIANTS for seed in SEEDS}
    denoiser, reward = load_denoiser("shapes-turbo"), load_reward({"shapes-exact": 1.0, "shapes-match": 1.0})
    results = as_results(
        evaluate(denoiser, reward, policies, PROMPTS, SAMPLES, seed=1_000_000),
        categories_of(PROMPTS),
        denoiser="shapes-turbo",
        prompt_set="hard_captions.txt",
        groups={name: [f"{name} {seed}" for seed in SEEDS] for name in VARIANTS},
        facts={"images": {name: read_records(folder_of(name, 0))[-1]["charts/images"] for name in VARIANTS}},
    )
    return to_record(results)


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    results = from_record(record, RUNS)
    scores = {group: 100 * results.by_seed(group, results.judge) for group in results.groups}
    options: dict[str, Any] = {"categories": results.categories, "prompts": results.prompts, "resample": "noise"}
    estimate = lambda scores: bootstrap(scores, **options)
    names = [name for name in VARIANTS if name in scores]
    changes = holm([paired_difference(scores[name], scores["base"], **options) for name in names if name != "base"])
    change = dict(zip([name for name in names if name != "base"], changes, strict=True))
    start = estimate(scores[results.baseline][0])
    rows = [["Gaussian noise", "", 0, start, "", "", 0, ""]]
    for name in names:
        right = estimate(scores[name])
        kl = float(np.mean([results.methods[member].kl_to_gaussian for member in results.groups[name]]))
        against = signed(change[name]) + significance_mark(change[name]) if name in change else ""
        per_nat = f"{(right.mean - start.mean) / kl:.2f}"
        cells = [VARIANTS[name].change, VARIANTS[name].setting, f"{results.facts['images'][name]:,}", right]
        rows.append([*cells, seed_spread(scores[name], estimate), against, f"{kl:.0f}", per_nat])
    head = ["change", "setting", "training images", "right", "std of seeds", "against the base", "KL", "right per nat"]
    return page(
        [
            f"Exactly right images in %, held-out detector, {len(results.prompts)} hard training captions x "
            f"{results.samples} fresh noises, `{results.denoiser}`; one change at a time. 95 % intervals over noise "
            f"and {len(SEEDS)} training seeds; differences from the base are paired by caption and noise; * excludes "
            f"0, after Holm correction for {len(change)} comparisons. Training uses rewards only, no reward gradients.",
            markdown(head, rows),
        ],
        "what_works",
        results.provenance,
    )


def main() -> None:
    """Entry point."""
    arguments = train_variants(__doc__, VARIANTS, train)
    if arguments.render:
        write("what_works", table, None)
    elif arguments.train is None:
        record = measure()
        write("what_works", table, record)
        curves(RESULTS / "what_works.png", float(np.mean(record["methods"][GAUSSIAN]["scores"]["shapes-match"])))


if __name__ == "__main__":
    main()
