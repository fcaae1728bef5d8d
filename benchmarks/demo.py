"""The demo with three training seeds: does it learn every time, and what happens on validation captions?

    python benchmarks/demo.py             # runs the missing seeds
    python benchmarks/demo.py --render    # the page again from its data

Writes ``demo.md``, the scores behind it, ``demo.json``, and the first seed's report, ``demo.png``, in
``benchmarks/results``. Runs go to ``runs/demo-seed-*``; finished seeds are not repeated.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pages import RESULTS, SEED_HEAD, SEEDS, markdown, page, publish, seed_cells  # in this folder

from noisear_rl import demo
from noisear_rl.evaluation.intervals import Resample, bootstrap
from noisear_rl.prompts import categories_of

PARTS: tuple[tuple[str, str, Resample], ...] = (
    ("trained", "Trained captions", "noise"),
    ("held_out", "Validation captions", "prompts"),
)


def measure() -> dict[str, Any]:
    """Runs the missing seeds and returns the scores of all."""
    folders = [Path(f"runs/demo-seed-{seed}") for seed in SEEDS]
    for seed, folder in zip(SEEDS, folders, strict=True):
        if not (folder / "results.json").exists():
            print(demo.run(demo.DemoConfig(output_dir=folder, seed=seed)))
    shutil.copy(folders[0] / "report.png", RESULTS / "demo.png")
    return {"seeds": [json.loads((folder / "results.json").read_text()) for folder in folders]}


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    seeds = record["seeds"]
    count = {key: len(set(seeds[0][key]["prompts"])) for key, *_ in PARTS}
    parts = [
        "Exactly right in %, held-out detector, equal NFE, 95 % intervals; gains paired. Trained captions: "
        f"{count['trained']}, with fresh noise (intervals over noise). Validation captions: {count['held_out']} "
        "distinct ones (intervals over captions). Pooled and gain: over training seeds as well.",
    ]
    for key, title, resample in PARTS:
        prompts, methods = seeds[0][key]["prompts"], list(seeds[0][key]["methods"])
        estimate = partial(bootstrap, categories=categories_of(prompts), prompts=prompts, resample=resample)
        of = lambda name, what, key=key: np.array([what(part[key]["methods"][name]) for part in seeds])
        exact = lambda name, of=of: 100 * of(name, lambda method: method["scores"]["shapes-exact"])  # (T, P, S)
        kl = {name: float(of(name, lambda method: method["kl_to_gaussian"]).mean()) for name in methods}
        baseline = exact(methods[0])[0]  # not trained: the same for every seed
        rows = [[methods[0], *seed_cells(baseline[None], None, estimate, kl[methods[0]])]]
        rows += [[name, *seed_cells(exact(name), baseline, estimate, kl[name])] for name in methods[1:]]
        parts += [f"## {title}", markdown(["method", *SEED_HEAD], rows)]
    return page(parts, "demo", seeds[0]["provenance"])


if __name__ == "__main__":
    publish("demo", __doc__, table, measure)
