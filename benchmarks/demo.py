"""The demo with three training seeds: does it learn every time, and what happens on validation captions?

    python benchmarks/demo.py

Writes ``benchmarks/results/demo.md`` and ``demo.png`` (the first seed's report). Runs go to ``runs/demo-seed-*``;
finished seeds are not repeated.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from noisear_rl import demo
from noisear_rl.evaluation.intervals import Resample, bootstrap
from noisear_rl.files import write_atomically
from noisear_rl.prompts import categories_of

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results"
PARTS: tuple[tuple[str, str, Resample], ...] = (
    ("trained", "Trained captions", "noise"),
    ("held_out", "Validation captions", "prompts"),
)


def main() -> None:
    """Runs the missing seeds and writes the table."""
    folders = [Path(f"runs/demo-seed-{seed}") for seed in SEEDS]
    for seed, folder in zip(SEEDS, folders, strict=True):
        if not (folder / "results.json").exists():
            print(demo.run(demo.DemoConfig(output_dir=folder, seed=seed)))
    records = [json.loads((folder / "results.json").read_text()) for folder in folders]
    lines = [
        "Exactly right in %, held-out detector, equal NFE, 95 % intervals. Trained captions: 4, with fresh noise "
        "(intervals over noise). Validation captions: 120 x 4 noises (intervals over captions). Pooled: mean over "
        "training seeds, with intervals over noise or captions; the spread of the seeds has its own column.",
    ]
    for key, title, resample in PARTS:
        lines += [
            "",
            f"## {title}",
            "",
            "| method | " + " | ".join(f"seed {s}" for s in SEEDS) + " | pooled | gain | std of seeds | KL |",
        ]
        lines.append("|" + "---|" * (len(SEEDS) + 5))
        categories = categories_of(records[0][key]["prompts"])
        methods = {
            name: np.array([record[key]["methods"][name]["scores"]["shapes-exact"] for record in records]) * 100
            for name in records[0][key]["methods"]
        }
        baseline = next(iter(methods.values()))
        for name, scores in methods.items():  # (seeds, P, S)
            each = [bootstrap(part, categories, resample=resample) for part in scores]
            pooled = bootstrap(scores.mean(0), categories, resample=resample)
            gain = bootstrap((scores - baseline).mean(0), categories, resample=resample)
            kl = np.mean([record[key]["methods"][name]["kl_to_gaussian"] for record in records])
            spread = np.std([estimate.mean for estimate in each], ddof=1)
            cells = [name, *(str(e) for e in each), str(pooled), "" if scores is baseline else str(gain)]
            lines.append("| " + " | ".join([*cells, f"{spread:.1f}", f"{kl:.1f}"]) + " |")
    lines += [
        "",
        f"Command: `python benchmarks/demo.py`. Trained at {records[0]['provenance']}.",
    ]
    write_atomically(RESULTS / "demo.md", "\n".join(lines) + "\n")
    shutil.copy(folders[0] / "report.png", RESULTS / "demo.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
