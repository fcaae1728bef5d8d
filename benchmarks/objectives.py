"""What improves a pretrained policy? One change at a time, equal images, captions of the validation split.

    python benchmarks/objectives.py                  # train what is missing, then evaluate
    python benchmarks/objectives.py --train 0 2      # train every second run and stop; for two processes: `0 2`, `1 2`
    python benchmarks/objectives.py --render         # the page again from its data

Starts from the policies that ``benchmarks/shapes.py`` pretrained, in ``runs/shapes``, whose longer PPO is also looked
at after 20, 40 and 80 updates. Interrupted runs resume. Writes ``objectives.md`` and the scores behind it,
``objectives.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pages import SEEDS, markdown, page, seed_spread, signed, train_variants, write  # in this folder
from shapes import IMAGES, LONG, ROOT, RUNS, evaluation, folder_of  # in this folder

from noisear_rl.algos import evaluate, nll, ppo, prior, trajectory_balance
from noisear_rl.config import load_yaml
from noisear_rl.data.shared_noise import build_pairs
from noisear_rl.evaluation.intervals import bootstrap, holm, paired_difference, significance_mark
from noisear_rl.evaluation.results import from_record, load_results, to_record

TRAINED = Path("runs/objectives")
SAME: dict[str, Any] = {"prompts": "train-balanced", "prompts_per_update": 256, "samples_per_prompt": 8}
SAME |= {"updates": IMAGES // 2048, "step": "fixed", "target_kl": 0.3, "save_every": 4, "resume": True}


@dataclass(frozen=True)
class Variant:
    """A way to improve, or to pretrain.

    Attributes:
        setting: What is done.
        images: Images denoised for it, besides those of the pretraining.
        stage: Folder of its policy in that of a training seed of ``shapes.py``; unset if it is trained here.
    """

    setting: str
    images: int = IMAGES
    stage: str | None = None


START = "NLL"
VARIANTS = {
    START: Variant("the start: twelve layouts", 0, "nll"),
    "one-layout": Variant("the start: the best layout of each caption alone", 0),
    "PPO": Variant("PPO, steps of 0.3 nats, leave-one-out baseline"),
    "adaptive": Variant("PPO, adaptive steps", IMAGES, "ppo"),
    "GRPO": Variant("GRPO, clip-higher: 0.5 and 1"),
    "TB": Variant("trajectory balance, β = 0.002, steps of 0.3 nats"),
    "PPO-20": Variant("PPO, 2.5 times the images", 40_960, f"{LONG}/checkpoints/step-000020"),
    "PPO-40": Variant("PPO, 5 times the images", 81_920, f"{LONG}/checkpoints/step-000040"),
    "PPO-80": Variant("PPO, 10 times the images", 163_840, LONG),
}


def policy_folder(name: str, seed: int) -> Path:
    """Returns the folder of a policy."""
    stage = VARIANTS[name].stage
    return TRAINED / f"{name}-seed-{seed}" if stage is None else folder_of(seed) / stage


def train(name: str, seed: int) -> None:
    """Trains one variant with one training seed; a finished run returns immediately."""
    folder, start = policy_folder(name, seed), str(folder_of(seed) / "nll")
    if VARIANTS[name].stage is not None:
        return
    own: dict[str, Any] = {"init_from": start, "output_dir": folder, "seed": seed} | SAME
    presets = ROOT / "configs/shapes"
    if name == "one-layout":
        stages = load_yaml(prior.PriorConfig, presets / "prior.yaml")
        shared = folder.with_name(f"{folder.name}-shared")
        build_pairs(replace(stages.shared_noise, margin=0.0, rollouts=folder_of(seed) / "tried", output_dir=shared))
        policy = replace(stages.nll.policy, layouts=0, layout_temperature=1.0)
        nll.train(replace(stages.nll, pairs=shared, policy=policy, output_dir=folder, seed=seed, resume=True))
    elif name == "TB":
        balance = load_yaml(trajectory_balance.TrajectoryBalanceConfig, presets / "trajectory_balance.yaml")
        trajectory_balance.train(replace(balance, steps=1, **own))
    else:
        grpo = {"advantage": "grpo", "clip_range": 0.5, "clip_high": 1.0} if name == "GRPO" else {}
        ppo.train(replace(load_yaml(ppo.PPOConfig, presets / "ppo_transfer.yaml"), **own | grpo))


def measure() -> dict[str, Any] | None:
    """Evaluates, and returns the scores; ``None`` in all processes but the main one."""
    methods = tuple(f"{name}={','.join(str(policy_folder(name, seed)) for seed in SEEDS)}" for name in VARIANTS)
    config = replace(
        evaluation(), methods=methods, prompts="validation", seed=3_000_000, output_dir=TRAINED / "evaluation"
    )
    return to_record(load_results(config.output_dir)) if evaluate.run(config) else None


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    results = from_record(record, RUNS)
    prompts, categories = results.prompts, results.categories
    scores = {group: 100 * results.by_seed(group, results.judge) for group in results.groups}
    others = [name for name in VARIANTS if name != START]
    changes = holm([paired_difference(scores[name], scores[START], categories, prompts=prompts) for name in others])
    change = dict(zip(others, changes, strict=True))
    noise = results.methods[results.baseline]
    estimate = lambda values: bootstrap(values, categories, prompts=prompts)
    rows = [["Gaussian noise", "", estimate(scores[results.baseline][0]), "", "", "1.00", "1.00", 0]]
    for name, variant in VARIANTS.items():
        members = [results.methods[member] for member in results.groups[name]]
        spread = [
            f"{np.mean([m.diversity[key].mean() for m in members]) / noise.diversity[key].mean():.2f}"
            for key in ("shapes-clip", "layout")
        ]
        kl = float(np.mean([member.kl_to_gaussian for member in members]))
        against = signed(change[name]) + significance_mark(change[name]) if name in change else ""
        cells = [variant.setting, f"{variant.images:,}", estimate(scores[name]), seed_spread(scores[name], estimate)]
        rows.append([*cells, against, *spread, f"{kl:.0f}"])
    head = ["policy", "further images", "right", "std of seeds", "against the start"]
    head += ["CLIP distance", "layout distance", "KL, nats"]
    return page(
        [
            f"Exactly right images in %, held-out detector (`{results.judge}`), {len(prompts)} captions of the "
            f"validation split ({len(set(prompts))} distinct ones) x {results.samples} noises, `{results.denoiser}`, "
            f"mean over six categories. 95 % intervals over distinct captions and {len(SEEDS)} training seeds; "
            f"differences from the start are paired by caption and noise; * excludes 0, after Holm correction for "
            f"{len(others)} comparisons. Diversity within a caption, Gaussian = 1. The start itself takes up to "
            "123,552 images.",
            markdown(head, rows),
        ],
        "objectives",
        results.provenance,
    )


def main() -> None:
    """Entry point."""
    arguments = train_variants(__doc__, VARIANTS, train)
    if arguments.render:
        write("objectives", table, None)
    elif arguments.train is None and (record := measure()):
        write("objectives", table, record)


if __name__ == "__main__":
    main()
