"""Which settings of the prior matter? The paper's ablations and its open question of scale, on `shapes`, three seeds.

    python benchmarks/ablations.py                  # train what is missing, then evaluate
    python benchmarks/ablations.py --train 0 2      # train every second run and stop; for two processes: `0 2`, `1 2`
    python benchmarks/ablations.py --render         # the page and the figure again from their data

Changes one setting at a time of ``configs/shapes/nll_shared_noise.yaml``, NLL on noises that serve many captions, which
is the pretraining that transfers. Each setting has its own preset (``configs/shapes/ablations``), except the number of
captions tried, an option of ``collect``, and the temperature, which needs no training. ``shared_noises.py`` trains the
base. Runs go to ``runs/ablations`` and ``runs/shared_noises``; interrupted runs resume. Writes ``ablations.md``, the
scores behind it and a figure, ``ablations.json`` and ``.png``, in ``benchmarks/results``. For guidance and inversion of
weak-to-strong pairs, see ``benchmarks/pairs.py``.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import shared_noises  # in this folder
from pages import RESULTS, SEEDS, markdown, page, signed, train_variants, write

from noisear_rl.algos import nll
from noisear_rl.config import load_yaml
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.evaluation.compare import as_results, evaluate
from noisear_rl.evaluation.intervals import Estimate, bootstrap, holm, paired_difference, significance_mark
from noisear_rl.evaluation.results import Results, from_record, read_record, to_record
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARPolicy, load_policy
from noisear_rl.report.plots import save_figure
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import GAUSSIAN

RUNS, PRESETS = Path("runs/ablations"), Path(__file__).parents[1] / "configs/shapes/ablations"
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
    own = [name for name in names if not name.startswith("temperature")]
    return sorted(own, key=lambda name: name == "patch_size_1")


def train(name: str, seed: int) -> None:
    """Trains one setting with one training seed; a finished run returns immediately."""
    if name == BASE:
        shared_noises.train(seed)
        return
    if name.startswith("tried"):
        config = load_yaml(nll.NLLConfig, shared_noises.PRESETS / "nll_shared_noise.yaml")
        pairs = shared_noises.make_pairs(RUNS / f"{name}-seed-{seed}-data", seed, num_prompts=int(name.split("_")[1]))
    else:
        config, pairs = load_yaml(nll.NLLConfig, PRESETS / f"{name}.yaml"), shared_noises.pairs_of(seed)
    nll.train(dataclasses.replace(config, pairs=pairs, output_dir=folder_of(name, seed), seed=seed, resume=True))


def folder_of(name: str, seed: int) -> Path:
    """Returns the run folder of a setting's policy."""
    own = name != BASE and not name.startswith("temperature")
    return RUNS / f"{name}-seed-{seed}" if own else shared_noises.policy_folder(seed)


def policy_of(name: str, seed: int) -> NoiseARPolicy:
    """Loads the policy of a setting."""
    policy = load_policy(folder_of(name, seed))
    if name.startswith("temperature"):
        policy.config = dataclasses.replace(policy.config, temperature=float(name.split("_")[1]))
    return policy


def measure() -> dict[str, Any]:
    """Returns the scores of every setting on validation captions, its size and its loss on held-out prompts."""
    captions = balanced_captions("validation", CAPTIONS)
    names = list(dict.fromkeys(name for settings in GROUPS.values() for name in settings))
    policies: dict[str, NoiseARPolicy | None] = {GAUSSIAN: None}
    policies |= {f"{name} {seed}": policy_of(name, seed) for name in names for seed in SEEDS}
    denoiser, reward = load_denoiser("shapes-turbo"), load_reward("shapes-exact")
    size = lambda name: sum(parameter.numel() for parameter in policy_of(name, 0).parameters())
    loss = lambda name: np.mean([read_records(folder_of(name, seed))[-1]["losses/nll_held_out"] for seed in SEEDS])
    results = as_results(
        evaluate(denoiser, reward, policies, [c.text for c in captions], SAMPLES, seed=2_000_000),
        [c.category for c in captions],
        denoiser="shapes-turbo",
        prompt_set="validation",
        groups={name: [f"{name} {seed}" for seed in SEEDS] for name in names},
        facts={
            "parameters": {name: size(name) for name in names},
            "nll": {name: float(loss(name)) for name in names if not name.startswith("temperature")},
        },
    )
    return to_record(results)


def value_of(title: str, name: str) -> str:
    """Returns how a setting is shown in its group."""
    if name == "reconstruction_0":
        return "NLL alone"
    return OF_BASE[title] if name == BASE else name.split("_")[-1]


def estimates(results: Results) -> dict[str, Estimate]:
    """Returns the share of right images in % by setting."""
    estimate = partial(bootstrap, categories=results.categories, prompts=results.prompts)
    return {group: estimate(100 * results.by_seed(group, results.judge)) for group in results.groups}


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    results = from_record(record, RUNS)
    scores = {group: 100 * results.by_seed(group, results.judge) for group in results.groups}
    right, parameters, rows = estimates(results), results.facts["parameters"], []
    prompts, categories = results.prompts, results.categories
    others = [name for name in scores if name not in (results.baseline, BASE)]
    changes = holm([paired_difference(scores[name], scores[BASE], categories, prompts=prompts) for name in others])
    change = dict(zip(others, changes, strict=True))
    for title, settings in GROUPS.items():
        for name in settings:
            against = signed(change[name]) + significance_mark(change[name]) if name in change else ""
            seeds = [bootstrap(part, categories, prompts=prompts).mean for part in scores[name]]
            kl = np.mean([results.methods[member].kl_to_gaussian for member in results.groups[name]])
            loss = f"{results.facts['nll'][name]:.3f}" if name in results.facts["nll"] else ""
            cells = [title, value_of(title, name), f"{parameters[name]:,}", loss, right[name]]
            rows.append([*cells, ", ".join(f"{mean:.1f}" for mean in seeds), against, f"{kl:.0f}"])
    head = ["", "setting", "parameters", "held-out NLL, nats per element", "right", "by seed", "against the base", "KL"]
    return page(
        [
            f"Exactly right images in %, held-out detector, {len(set(prompts))} distinct validation captions in "
            f"{len(prompts)} rows x {results.samples} noises, 1 network evaluation per image, mean over six "
            f"categories; NLL on shared noises, one setting changed per row, {len(SEEDS)} training seeds. 95 % "
            "intervals over distinct captions and training seeds, paired against the base; * excludes 0, after Holm "
            f"correction for {len(change)} comparisons. The base has {parameters[BASE]:,} parameters. Gaussian noise: "
            f"{right[results.baseline]}.",
            markdown(head, rows),
        ],
        "ablations",
        results.provenance,
    )


def scaling(path: Path, results: Results) -> None:
    """Plots the percentage of right images against the size of the model and of the data."""
    right, parameters = estimates(results), results.facts["parameters"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), dpi=110, sharey=True)
    model = dict.fromkeys((*GROUPS["width"], *GROUPS["decoder layers"]))
    sizes = sorted(((parameters[name], right[name]) for name in model), key=lambda point: point[0])
    data = [(int(value_of("captions tried", name)), right[name]) for name in GROUPS["captions tried"]]
    for axes, points, label in zip(panels, (sizes, data), ("parameters", "captions tried"), strict=True):
        x = [size for size, _ in points]
        means = np.array([estimate.mean for _, estimate in points])
        low, high = (np.array([getattr(estimate, side) for _, estimate in points]) for side in ("low", "high"))
        axes.errorbar(x, means, [means - low, high - means], fmt="o-", color="#2166ac", capsize=3)
        axes.axhline(right[results.baseline].mean, color="0.5", linestyle="--", linewidth=1, label="Gaussian noise")
        axes.set(xlabel=label, xscale="log")
        axes.minorticks_off()
        axes.set_xticks(x, [f"{size / 1e6:.2g} M" if size >= 1e5 else str(size) for size in x])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("exactly right, %")
    panels[0].legend(frameon=False)
    figure.suptitle("Validation captions, three seeds, 95 % intervals over captions and training seeds", fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    """Entry point."""
    arguments = train_variants(__doc__, trained(), train)
    if arguments.train is None:
        write("ablations", table, None if arguments.render else measure())
        scaling(RESULTS / "ablations.png", from_record(read_record(RESULTS / "ablations.json"), RUNS))


if __name__ == "__main__":
    main()
