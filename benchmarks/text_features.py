"""Does a policy read its prompt? The four relations of one pair of objects, by text pathway; three training seeds.

    python benchmarks/text_features.py
    python benchmarks/text_features.py --render    # the page again from its data

"A left of B" and "A right of B" want opposite noises and have nearly equal text embeddings. REINFORCE trains on the
four captions of a pair at a time, with equal images for every text pathway; the held-out judge sees fresh noise. Runs
go to ``runs/text_features``; interrupted runs resume. Writes ``text_features.md`` and the scores behind it,
``text_features.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pages import SEEDS, publish  # in this folder
from tqdm.auto import tqdm

from noisear_rl.algos import reinforce
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import RELATIONS
from noisear_rl.evaluation.compare import evaluate
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig, load_policy
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import GAUSSIAN

RUNS, SAMPLES = Path("runs/text_features"), 64
PAIRS = (("a red circle", "a blue square"), ("a green triangle", "a yellow cross"))
SETTINGS: dict[str, Any] = {
    "env_id": "NoiseAR-ShapesTurbo-v0",
    "prompts_per_update": 4,
    "samples_per_prompt": 64,
    "updates": 30,
    "target_kl": 2.0,
    "save_every": 10,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "normalized": {},
    "normalized, text x 4": {"text_scale": 4.0},
    "whitened": {"text_features": "whitened"},
    "whitened, text x 4": {"text_features": "whitened", "text_scale": 4.0},
}


def captions(pair: int) -> tuple[str, ...]:
    """Returns the four captions of a pair of objects."""
    first, second = PAIRS[pair]
    return tuple(f"a photo of {first} {relation} {second}" for relation in RELATIONS)


def folder_of(variant: str, pair: int, seed: int) -> Path:
    """Returns the folder of a run."""
    return RUNS / f"{variant.replace(', ', '-').replace(' ', '')}-pair{pair}-seed{seed}"


def train() -> None:
    """Trains what is missing."""
    runs = [(variant, pair, seed) for variant in VARIANTS for pair in range(len(PAIRS)) for seed in SEEDS]
    for variant, pair, seed in tqdm(runs, desc="runs"):
        policy = NoiseARConfig(log_variance="fixed", **VARIANTS[variant])
        folder = folder_of(variant, pair, seed)
        options: dict[str, Any] = {
            "prompts": captions(pair),
            "policy": policy,
            "output_dir": folder,
            "seed": seed,
            "resume": True,
        }
        reinforce.train(reinforce.ReinforceConfig(**SETTINGS, **options))


def measure() -> dict[str, Any]:
    """Trains what is missing; returns every variant's scores ``(pairs, seeds, captions, samples)`` and its logs."""
    train()
    denoiser, judge = load_denoiser("shapes-turbo"), load_reward("shapes-exact")
    data: dict[str, Any] = {GAUSSIAN: {"right": [], "kl": [], "cross_talk": []}} | {
        name: {"right": [], "kl": [], "cross_talk": []} for name in VARIANTS
    }
    for pair in range(len(PAIRS)):
        methods = {(name, seed): load_policy(folder_of(name, pair, seed)) for name in VARIANTS for seed in SEEDS}
        named = {f"{name} {seed}": policy for (name, seed), policy in methods.items()}
        results = evaluate(denoiser, judge, {GAUSSIAN: None, **named}, captions(pair), SAMPLES, seed=1_000_000)
        right = {name: result.scores["shapes-exact"].astype(int).tolist() for name, result in results.items()}
        data[GAUSSIAN]["right"].append([right[GAUSSIAN]])
        for name in VARIANTS:
            logs = [read_records(folder_of(name, pair, seed)) for seed in SEEDS]
            talk = [[r["policy/cross_talk"] for r in log if "policy/cross_talk" in r][-1] for log in logs]
            data[name]["right"].append([right[f"{name} {seed}"] for seed in SEEDS])
            data[name]["kl"].append([results[f"{name} {seed}"].kl_to_gaussian for seed in SEEDS])
            data[name]["cross_talk"].append(talk)
    return {"captions": [captions(pair) for pair in range(len(PAIRS))], "methods": data}


def table(record: dict[str, Any]) -> str:
    """Renders the table from the record."""
    images = SETTINGS["updates"] * SETTINGS["prompts_per_update"] * SETTINGS["samples_per_prompt"]
    lines = [
        f"Right images in % by the held-out judge on the four relations of a pair of objects: REINFORCE, {images:,} "
        f"images per run, {SETTINGS['target_kl']:g} nats per update, {SAMPLES} fresh noises per caption. The captions "
        f"are those trained on. Means over {len(SEEDS)} training seeds, their standard deviation in brackets.",
        "",
        "| text pathway | "
        + " | ".join(f"pair {i + 1}" for i in range(len(PAIRS)))
        + " | "
        + " | ".join(f"{relation}" for relation in RELATIONS)
        + " | cross-talk | KL |",
        "|" + "---|" * (len(PAIRS) + len(RELATIONS) + 3),
    ]
    for name, values in record["methods"].items():
        right = 100 * np.array(values["right"]).mean(-1)  # (pairs, seeds, captions)
        cells = []
        for part in right.mean(-1):
            cells.append(f"{part.mean():.1f}" + (f" ({part.std(ddof=1):.1f})" if len(part) > 1 else ""))
        cells += [f"{value:.0f}" for value in right.mean((0, 1))]
        for key, digits in (("cross_talk", 2), ("kl", 0)):
            cells.append(f"{np.mean(values[key]):.{digits}f}" if values[key] else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    pairs = "; ".join(f"pair {i + 1}: {first} and {second}" for i, (first, second) in enumerate(PAIRS))
    lines += [
        "",
        f"{pairs[0].upper() + pairs[1:]}. Cross-talk: the share by which a small gradient step on one caption moves "
        "the others, at the end of training; 1 means that captions are not distinguished.",
        "",
        f"Command: `python benchmarks/text_features.py`. {record['provenance']}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    publish("text_features", __doc__, table, measure)
