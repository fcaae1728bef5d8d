"""Do long trainings leak? Memory, file handles, threads and CPU time per update over 2,000 updates of PPO.

    python benchmarks/soak.py                # 2,000 updates
    python benchmarks/soak.py --updates 50   # fewer; prints the page and writes nothing
    python benchmarks/soak.py --render       # the page and the figure again from their data

The denoiser is the embedded one-step pipeline, the policy is tiny, and a checkpoint is saved every 20 updates, of which
two are kept, so that every part of a training is used often. Needs Linux (``/proc``). Writes ``soak.md``, ``soak.png``
and the measurements, ``soak.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from pages import RESULTS, markdown, page, parser_of, write  # in this folder

from noisear_rl.algos import ppo
from noisear_rl.evaluation.results import read_record
from noisear_rl.learning.run import Run
from noisear_rl.policy import NoiseARConfig
from noisear_rl.provenance import provenance
from noisear_rl.report.plots import save_figure

UPDATES, BINS, WARM_UP = 2000, 100, 0.1  # the first tenth fills caches, and is not compared
PROMPTS = ("a photo of a red circle", "a photo of two blue squares")
SMALL = NoiseARConfig(d_model=32, d_ff=32, n_layers=1, n_heads=2, log_variance="fixed")
QUANTITIES = {
    "memory": ("resident memory, MB", 0.02),
    "handles": ("open file handles", 0.0),
    "threads": ("threads", 0.0),
    "seconds": ("CPU seconds per update", 0.1),
}  # what is shown, and by which share it may grow


def look() -> dict[str, float]:
    """Returns what this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "handles": float(len(os.listdir("/proc/self/fd"))),
        "threads": float(threading.active_count()),
    }


def measure(updates: int) -> dict[str, Any]:
    """Trains and returns the measurements after every update, as medians of up to 100 bins."""
    found: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    log, last = Run.log, [time.process_time()]

    def measured(self: Run, values: dict[str, float], step: int) -> None:
        log(self, values, step)
        now = time.process_time()
        for name, value in (look() | {"seconds": now - last[0]}).items():
            found[name].append(value)
        last[0] = now

    with tempfile.TemporaryDirectory() as folder:
        Run.log = measured  # type: ignore[method-assign]
        try:
            config = ppo.PPOConfig(
                "NoiseAR-ShapesTurbo-v0",
                prompts=PROMPTS,
                policy=SMALL,
                updates=updates,
                prompts_per_update=2,
                samples_per_prompt=4,
                save_every=20,
                keep_checkpoints=2,
                output_dir=Path(folder) / "run",
            )
            ppo.train(config)
        finally:
            Run.log = log  # type: ignore[method-assign]
        files = sum(path.is_file() for path in Path(folder).rglob("*"))
    bins = {
        name: [round(float(np.median(part)), 5) for part in np.array_split(values, min(BINS, len(values)))]
        for name, values in found.items()
    }
    return {"updates": updates, "files": files, "episodes_per_update": 8, **bins}


def compared(values: list[float]) -> tuple[float, float, float]:
    """Returns the medians of the first and the last fifth after the warm-up, and the share by which it grew."""
    after = np.array(values[int(WARM_UP * len(values)) :])
    fifth = max(1, len(after) // 5)
    first, last = float(np.median(after[:fifth])), float(np.median(after[-fifth:]))
    return first, last, last / first - 1


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    rows, flat = [], True
    for name, (title, allowed) in QUANTITIES.items():
        first, last, growth = compared(record[name])
        flat &= growth <= allowed
        form = ".4f" if name == "seconds" else ".0f"
        rows.append([title, f"{first:{form}}", f"{last:{form}}", f"{100 * growth:+.1f} %", f"{100 * allowed:.0f} %"])
    verdict = "Nothing grows." if flat else "Something grows: see the table."
    parts = [
        "# Two thousand updates" if record["updates"] == UPDATES else f"# {record['updates']} updates",
        f"PPO, {record['updates']:,} updates of {record['episodes_per_update']} episodes on the embedded one-step "
        "pipeline, a checkpoint every 20 updates. Medians of the first and the last fifth, after the first tenth. "
        f"{verdict} {record['files']} files in the run folder at the end.",
        markdown(["", "first", "last", "growth", "allowed"], rows),
    ]
    if record["updates"] == UPDATES:
        parts.append("![Memory, handles, threads and time per update](soak.png)")
    return page(parts, "soak", record["provenance"])


def figure(record: dict[str, Any], path: Path) -> None:
    """Draws every quantity over the updates."""
    panels, axes = plt.subplots(1, len(QUANTITIES), figsize=(12, 2.8), dpi=110)
    for axis, (name, (title, _)) in zip(axes, QUANTITIES.items(), strict=True):
        values = record[name]
        axis.plot(np.linspace(0, record["updates"], len(values)), values, linewidth=1)
        axis.set(xlabel="updates", title=title, ylim=(0, 1.3 * max(values)))
        axis.grid(alpha=0.3)
    panels.tight_layout()
    save_figure(panels, path)


def main() -> None:
    """Entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--updates", type=int, default=UPDATES, help="number of updates")
    arguments = parser.parse_args()
    start = {"provenance": provenance()}
    record = None if arguments.render else start | measure(arguments.updates)
    if record is not None and arguments.updates != UPDATES:
        print(table(record))
        return
    write("soak", table, record)
    figure(read_record(RESULTS / "soak.json"), RESULTS / "soak.png")


if __name__ == "__main__":
    main()
