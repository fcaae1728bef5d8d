"""Does `noisear ppo` learn with its default options? Two hard captions, 30 updates, ten training seeds.

    python benchmarks/ppo_defaults.py              # train what is missing, then evaluate
    python benchmarks/ppo_defaults.py --seeds 0 1  # train and evaluate some seeds and stop; processes can share them
    python benchmarks/ppo_defaults.py --render     # the page again from its data

The captions are the second and third of ``benchmarks/hard_captions.txt``: one of ``position`` and one of
``color_attr``. Nothing but prompts, updates and seed differs from the defaults, so that steps are adaptive. Rewards
before and after are those of fresh noise, the same for every seed. Runs go to ``runs/ppo_defaults``; interrupted runs
resume. Writes ``ppo_defaults.md`` and the scores behind it, ``ppo_defaults.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pages import markdown, page, parser_of, signed, write  # in this folder

from noisear_rl.algos import ppo
from noisear_rl.denoisers import load_denoiser
from noisear_rl.evaluation.compare import evaluate, summary
from noisear_rl.evaluation.intervals import bootstrap, holm, significance_mark
from noisear_rl.files import write_atomically
from noisear_rl.learning.records import read_records
from noisear_rl.policy import load_policy
from noisear_rl.prompts import categories_of
from noisear_rl.provenance import provenance
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import GAUSSIAN

RUNS, SEEDS = Path("runs/ppo_defaults"), tuple(range(10))
PROMPTS = tuple((Path(__file__).parent / "hard_captions.txt").read_text().splitlines()[1:3])
ENV, UPDATES, SAMPLES = "NoiseAR-ShapesTurbo-v0", 30, 128
REWARD, JUDGE = "shapes-match", "shapes-exact"  # the default reward of the environment, and the held-out judge


def config_of(seed: int) -> ppo.PPOConfig:
    """Returns the options of a training seed."""
    folder = RUNS / f"seed-{seed}"
    return ppo.PPOConfig(env_id=ENV, prompts=PROMPTS, updates=UPDATES, output_dir=folder, seed=seed, resume=True)


def run(seed: int | None) -> dict[str, Any]:
    """Trains a seed and scores fresh noise, unless that is done; ``None`` for Gaussian noise.

    Returns:
        The scores ``(captions, samples)`` by scorer, the KL in nats, and the logged sizes of all updates.
    """
    name = GAUSSIAN if seed is None else f"seed-{seed}"
    file = RUNS / f"{name}.json"
    if not file.exists():
        if seed is not None:
            ppo.train(config_of(seed))
        method = None if seed is None else load_policy(RUNS / name)
        reward = load_reward({REWARD: 1.0, JUDGE: 1.0})
        denoiser = load_denoiser("shapes-turbo")
        found = evaluate(denoiser, reward, {name: method}, PROMPTS, SAMPLES, seed=3_000_000, keep_images=0)
        log = [] if seed is None else read_records(RUNS / name)
        steps = [round(record["policy/step_kl"], 5) for record in log]
        kept = {key: summary(found, PROMPTS)["methods"][name][key] for key in ("scores", "kl_to_gaussian")}
        images = int(log[-1]["charts/images"]) if log else 0
        write_atomically(file, json.dumps(kept | {"steps": steps, "images": images, "provenance": provenance()}))
    return json.loads(file.read_text())


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    prompts, seeds = record["prompts"], record["seeds"]
    categories = categories_of(prompts)
    estimate = lambda scores: bootstrap(scores, categories, prompts=prompts, resample="noise")
    of = lambda part, scorer: np.array(part["scores"][scorer])
    before = {scorer: of(record["gaussian"], scorer) for scorer in (REWARD, JUDGE)}
    after = {scorer: np.stack([of(part, scorer) for part in seeds.values()]) for scorer in (REWARD, JUDGE)}
    gains = holm([estimate(part - before[REWARD]) for part in after[REWARD]])
    start = f"{estimate(before[REWARD]).mean:.3f}"
    rows: list[list[Any]] = []
    for i, (seed, part) in enumerate(seeds.items()):
        right = f"{100 * estimate(after[JUDGE][i]).mean:.1f}"
        gain = gains[i].text(3, "+") + significance_mark(gains[i])
        largest, end = f"{max(part['steps']):.2f}", f"{estimate(after[REWARD][i]).mean:.3f}"
        rows.append([seed, start, end, gain, right, f"{part['kl_to_gaussian']:.1f}", largest])
    if len(seeds) > 1:
        kl = f"{np.mean([part['kl_to_gaussian'] for part in seeds.values()]):.1f}"
        right, gain = estimate(100 * after[JUDGE]).text(1), estimate(after[REWARD] - before[REWARD]).text(3, "+")
        rows.append(["all", start, estimate(after[REWARD]).text(3), gain, right, kl, ""])
    rose = sum(significance_mark(gain) == "*" and gain.mean > 0 for gain in gains)
    judged = signed(estimate(100 * (after[JUDGE] - before[JUDGE])))
    first = next(iter(seeds.values()))
    return page(
        [
            f"`noisear ppo` with its default options on `shapes-turbo`: {len(first['steps'])} updates, "
            f"{first['images']:,} images per training seed, the captions {' and '.join(f'“{p}”' for p in prompts)}. "
            f"Reward (`{REWARD}`) of {before[REWARD].shape[1]} fresh noises per caption, before from Gaussian noise, "
            "after from the policy; 95 % intervals over noise, in the last row over training seeds as well; * excludes "
            f"0, after Holm correction for {len(gains)} comparisons. Right: images in % by the held-out judge "
            f"(`{JUDGE}`). KL to N(0, I) and the largest update in nats.",
            markdown(["training seed", "before", "after", "gain", "right, %", "KL", "largest update"], rows),
            f"The reward rose in {rose} of {len(gains)} seeds. Right before: "
            f"{estimate(100 * before[JUDGE]).text(1)} %; gain in points: {judged}.",
        ],
        "ppo_defaults",
        record["gaussian"]["provenance"],
    )


def main() -> None:
    """Entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, help="train and evaluate some seeds and stop")
    arguments = parser.parse_args()
    if arguments.seeds:
        for seed in arguments.seeds:
            run(seed)
        return
    record = None
    if not arguments.render:
        seeds = {str(seed): run(seed) for seed in SEEDS}
        record = {"prompts": list(PROMPTS), "gaussian": run(None), "seeds": seeds}
    write("ppo_defaults", table, record)


if __name__ == "__main__":
    main()
