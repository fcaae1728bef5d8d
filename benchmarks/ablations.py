"""Which settings of the prior matter? The paper's ablations and its open question of scale, on `shapes`, three seeds.

    python benchmarks/ablations.py                  # train what is missing, then evaluate
    python benchmarks/ablations.py --train 0 2      # train every second run and stop; for two processes: `0 2`, `1 2`

Changes one setting at a time of ``configs/shapes/nll_shared_noise.yaml``, NLL on noises that serve many captions, which
is the pretraining that transfers. Each setting has its own preset (``configs/shapes/ablations``), except the number of
captions tried, an option of ``collect``, and the temperature, which needs no training. ``held_out.py`` trains the base.
Runs go to ``runs/ablations`` and ``runs/held_out``; interrupted runs resume. Writes ``benchmarks/results/ablations.md``
and ``ablations.png``. For guidance and inversion of weak-to-strong pairs, see ``benchmarks/pairs.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import held_out  # in this folder
import matplotlib.pyplot as plt
import numpy as np
from seeds import SEEDS

from noisear_rl.algos import collect, nll
from noisear_rl.config import load_yaml
from noisear_rl.data import shared_noise
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.evaluation.compare import evaluate
from noisear_rl.evaluation.intervals import Estimate, bootstrap, paired_difference, significance_mark
from noisear_rl.files import write_atomically
from noisear_rl.learning.run import read_records
from noisear_rl.policy import NoiseARPolicy, load_policy
from noisear_rl.provenance import provenance
from noisear_rl.report.plots import save_figure
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import GAUSSIAN

ROOT = Path(__file__).parents[1]
RUNS, RESULTS = Path("runs/ablations"), ROOT / "benchmarks/results"
PRESETS = ROOT / "configs/shapes/ablations"
CAPTIONS, SAMPLES = 240, 4
TRIED = (24, 96, 384)  # captions; the last number is the base
BASE = "base"
GROUPS = {  # title → settings; a preset's name, `tried_N`, or `temperature_T`
    "patch side": ("patch_size_1", BASE, "patch_size_4", "patch_size_8"),
    "decoder layers": ("n_layers_1", BASE, "n_layers_4"),
    "blocks in the head (the authors' network)": tuple(f"n_prediction_head_{blocks}" for blocks in range(3)),
    "width": ("d_model_64", BASE, "d_model_256"),
    "loss": (BASE, "reconstruction_0"),
    "captions tried": (*(f"tried_{count}" for count in TRIED[:-1]), BASE),
    "temperature": ("temperature_0.25", "temperature_0.5", "temperature_0.75", BASE, "temperature_1.25"),
}
OF_BASE = {
    "patch side": "2",
    "decoder layers": "2",
    "width": "128",
    "loss": "NLL + 0.2 reconstruction",
    "captions tried": str(TRIED[-1]),
    "temperature": "1",
}


def trained() -> list[str]:
    """Returns the settings that need their own training, the slowest last."""
    names = dict.fromkeys(name for names in GROUPS.values() for name in names)
    own = [name for name in names if name != BASE and not name.startswith("temperature")]
    return sorted(own, key=lambda name: name == "patch_size_1")


def train(name: str, seed: int) -> None:
    """Trains one setting with one training seed; a finished run returns immediately."""
    folder, pairs = RUNS / f"{name}-seed-{seed}", held_out.folder_of("shared-pairs", seed)
    config = load_yaml(nll.NLLConfig, held_out.PRESETS / "nll_shared_noise.yaml")
    if name.startswith("tried"):
        tried, pairs = RUNS / f"{name}-rollouts-{seed}", RUNS / f"{name}-pairs-{seed}"
        few = {"num_prompts": int(name.split("_")[1]), "seed": seed}
        held_out.run(collect.collect, collect.CollectConfig, "collect_same_noise.yaml", tried, **few)
        chosen = {"rollouts": tried}
        held_out.run(shared_noise.build_pairs, shared_noise.SharedNoiseConfig, "shared_noise.yaml", pairs, **chosen)
    else:
        config = load_yaml(nll.NLLConfig, PRESETS / f"{name}.yaml")
    nll.train(dataclasses.replace(config, pairs=pairs, output_dir=folder, seed=seed, resume=True))


def folder_of(name: str, seed: int) -> Path:
    """Returns the run folder of a setting's policy."""
    own = name != BASE and not name.startswith("temperature")
    return RUNS / f"{name}-seed-{seed}" if own else held_out.folder_of("shared", seed)


def policy_of(name: str, seed: int) -> NoiseARPolicy:
    """Loads the policy of a setting."""
    policy = load_policy(folder_of(name, seed))
    if name.startswith("temperature"):
        policy.config = dataclasses.replace(policy.config, temperature=float(name.split("_")[1]))
    return policy


def parameters(name: str) -> int:
    """Returns the number of parameters of a setting's policy."""
    return sum(parameter.numel() for parameter in policy_of(name, 0).parameters())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, nargs=2, metavar=("I", "N"), help="train every N-th run from I and stop")
    arguments = parser.parse_args()
    first, step = arguments.train or (0, 1)
    for name, seed in [(name, seed) for name in trained() for seed in SEEDS][first::step]:
        train(name, seed)
    if arguments.train is not None:
        return
    captions = balanced_captions("validation", CAPTIONS)
    prompts, categories = [c.text for c in captions], [c.category for c in captions]
    names = list(dict.fromkeys(name for settings in GROUPS.values() for name in settings))
    policies: dict[str, NoiseARPolicy | None] = {GAUSSIAN: None}
    policies |= {f"{name} {seed}": policy_of(name, seed) for name in names for seed in SEEDS}
    denoiser, reward = load_denoiser("shapes-turbo"), load_reward("shapes-exact")
    results = evaluate(denoiser, reward, policies, prompts, SAMPLES, seed=2_000_000)
    scores = {name: result.scores["shapes-exact"] * 100 for name, result in results.items()}
    pooled = {name: np.mean([scores[f"{name} {seed}"] for seed in SEEDS], axis=0) for name in names}
    lines = [
        f"Exactly right images in %, held-out detector, {CAPTIONS} validation captions x {SAMPLES} noises, "
        "1 network evaluation per image, mean over six categories; NLL on shared noises, one setting changed per row, "
        "three training seeds. 95 % intervals over captions, paired against the base; * excludes 0. The base has "
        f"{parameters(BASE):,} parameters. Gaussian noise: {bootstrap(scores[GAUSSIAN], categories)}.",
        "",
        "| | setting | parameters | held-out NLL, nats per element | right | by seed | against the base | KL |",
        "|---" * 8 + "|",
    ]
    shown: dict[str, list[tuple[str, Estimate, str]]] = {}
    for title, settings in GROUPS.items():
        for name in settings:
            value = OF_BASE[title] if name == BASE else name.split("_")[-1]
            value = "NLL alone" if name == "reconstruction_0" else value
            estimate = bootstrap(pooled[name], categories)
            shown.setdefault(title, []).append((value, estimate, name))
            change = paired_difference(pooled[name], pooled[BASE], categories)
            against = "" if name == BASE else change.text(1, "+") + significance_mark(change)
            seeds = ", ".join(f"{bootstrap(scores[f'{name} {seed}'], categories).mean:.1f}" for seed in SEEDS)
            kl = np.mean([results[f"{name} {seed}"].kl_to_gaussian for seed in SEEDS])
            loss = np.mean([read_records(folder_of(name, seed))[-1]["losses/nll_held_out"] for seed in SEEDS])
            loss_text = "" if name.startswith("temperature") else f"{loss:.3f}"
            cells = [title, value, f"{parameters(name):,}", loss_text, str(estimate), seeds, against, f"{kl:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Command: `python benchmarks/ablations.py`. Evaluated at {provenance()}."]
    write_atomically(RESULTS / "ablations.md", "\n".join(lines) + "\n")
    scaling(RESULTS / "ablations.png", shown, bootstrap(scores[GAUSSIAN], categories))
    print("\n".join(lines))


def scaling(path: Path, shown: dict[str, list[tuple[str, Estimate, str]]], gaussian: Estimate) -> None:
    """Plots the percentage of right images against the size of the model and of the data."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), dpi=110, sharey=True)
    model = [*shown["width"], *(row for row in shown["decoder layers"] if row[2] != BASE)]
    sizes = sorted((parameters(name), estimate) for _, estimate, name in model)
    data = [(int(value), estimate) for value, estimate, _ in shown["captions tried"]]
    for axes, points, label in zip(panels, (sizes, data), ("parameters", "captions tried"), strict=True):
        x = [size for size, _ in points]
        means = np.array([estimate.mean for _, estimate in points])
        low, high = (np.array([getattr(estimate, side) for _, estimate in points]) for side in ("low", "high"))
        axes.errorbar(x, means, [means - low, high - means], fmt="o-", color="#2166ac", capsize=3)
        axes.axhline(gaussian.mean, color="0.5", linestyle="--", linewidth=1, label="Gaussian noise")
        axes.set(xlabel=label, xscale="log")
        axes.minorticks_off()
        axes.set_xticks(x, [f"{size / 1e6:.2g} M" if size >= 1e5 else str(size) for size in x])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("exactly right, %")
    panels[0].legend(frameon=False)
    figure.suptitle("Validation captions, three seeds, 95 % intervals over captions", fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
