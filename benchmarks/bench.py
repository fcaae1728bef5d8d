"""How far is the library from its limits? Every ratio within one run, after a warm-up, all candidates in turn.

    python benchmarks/bench.py                          # 15 minutes on an idle machine
    python benchmarks/bench.py --only rollouts pairs    # these rows anew; the others stay as they were
    python benchmarks/bench.py --repeats 1              # to see whether everything runs
    python benchmarks/bench.py --render                 # the page again from its data

Times are CPU seconds of one thread, which leave out what other programs take. Rows: ``bench_policy.py`` (the policy at
its published size) and ``bench_loops.py`` (whole loops); the figure and the profiles: ``bench_scaling.py``. Writes
``bench.md``, ``bench.png`` and the numbers behind them, ``bench.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bench_loops  # in this folder
import bench_policy
import bench_scaling
import numpy as np
import torch
from bench_policy import FULL, HALF, LIKE_AUTHORS, READING
from pages import RESULTS, markdown, page, parser_of, write
from timing import Seconds, command_seconds, ratios

from noisear_rl.evaluation.results import read_record
from noisear_rl.provenance import provenance

REPEATS, UPDATES, LONGEST, RATES = 5, 4, 24, (3e-4, 1e-3)
SEEDS = (0, 1, 2)
HEAD = ("what", "measured", "reach", "limit", "reached")
SMALL = {"float32": (3.5, 6.0, 8.0), "bfloat16": (5.0, None, 16.0)}
COMMANDS = {
    "import noisear_rl": (["-c", "import noisear_rl, sys; assert 'torch' not in sys.modules"], 0.1),
    "noisear --help": (["-m", "noisear_rl.cli", "--help"], 0.3),
    "noisear ppo --help": (["-m", "noisear_rl.cli", "ppo", "--help"], 2.0),
    "(Python alone)": (["-c", "pass"], None),
    "(import gymnasium)": (["-c", "import gymnasium"], None),
    "(import torch)": (["-c", "import torch"], None),
}


def commands(repeats: int) -> Seconds:
    """CPU seconds of processes."""
    return {
        name: [command_seconds(arguments) for _ in range(repeats + 1)][1:] for name, (arguments, _) in COMMANDS.items()
    }


def measured(repeats: int) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    seeds = SEEDS[: max(1, min(len(SEEDS), repeats))]
    return {
        "sampling": lambda: bench_policy.sampling(repeats),
        "nll": lambda: bench_policy.nll_step(repeats),
        "memory": bench_policy.memory,
        "rollouts": lambda: bench_loops.rollouts(repeats),
        "pairs": lambda: bench_loops.pairs(repeats),
        "ppo": lambda: bench_loops.ppo_beside_others(UPDATES, seeds[:2]),
        "natural": lambda: bench_loops.natural_beside_adam(LONGEST, seeds[:2], RATES),
        "commands": lambda: commands(repeats),
        "scaling": lambda: bench_scaling.scaling(repeats),
        "processes": bench_scaling.processes,
        "profiles": bench_scaling.profiles,
    }


def row(
    what: str, value: float, shown: str, reach: float | None, limit: str, sign: str = "≥", unit: str = ""
) -> list[str]:
    """A row of the table; ``sign`` says on which side of its reach a value should be."""
    met = "" if reach is None else "yes" if (value >= reach) == (sign == "≥") or value == reach else "**no**"
    return [what, shown, "" if reach is None else f"{sign} {reach:g}{unit}", limit, met]


def ratio_row(
    what: str, seconds: Seconds, over: str, under: str, reach: float | None, limit: str, unit: str = "×"
) -> list[str]:
    """A row of a ratio of times, with its range over the repetitions."""
    factor = 100 if unit == " %" else 1
    median, low, high = (factor * value for value in ratios(seconds, over, under))
    digits = 0 if unit == " %" else 1
    return row(
        what, median, f"{median:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})", reach, limit, unit=unit
    )


def rows(record: dict[str, Any]) -> list[list[str]]:
    """The rows of whatever was measured."""
    found: list[list[str]] = []
    if sampling := record.get("sampling"):
        for dtype in (FULL, HALF):
            for (batch, seconds), reach in zip(sampling["seconds"].items(), SMALL[dtype], strict=True):
                what = f"sampling in {dtype}, batch {batch}, beside the authors' loop in float32"
                read = ratios(seconds, LIKE_AUTHORS, READING)[0] * (1 if dtype == FULL else 2)
                limit = f"10.7× fewer FLOPs; {read:.1f}×: weights are read at every patch"
                found.append(ratio_row(what, seconds, LIKE_AUTHORS, dtype, reach, limit))
    if nll := record.get("nll"):
        for dtype in (FULL, HALF):
            seconds = nll["seconds"]
            share = nll["flops"] / nll["product"] * 100
            median, low, high = (share * value for value in ratios(seconds, f"product, {dtype}", dtype))
            reach = 70.0 if dtype == FULL else None
            what = f"an NLL step in {dtype}, batch {bench_policy.NLL_BATCH}, of the rate of a matrix product"
            found.append(row(what, median, f"{median:.0f} % ({low:.0f} to {high:.0f})", reach, "100 %", unit=" %"))
    if natural := record.get("natural"):
        found += natural_rows(natural)
    if rollouts := record.get("rollouts"):
        what = f"rollouts of {bench_loops.ENVS} environments, `shapes-turbo`, of the bare denoiser's and scorer's rate"
        found.append(ratio_row(what, rollouts, "bare", "rollout", 95.0, "100 %", " %"))
    if libraries := record.get("ppo"):
        mine = libraries["ours"]
        for name in ("Stable-Baselines3", "TorchRL"):
            other = libraries[name]
            pair = {"ours": mine["seconds"], name: other["seconds"]}
            returns = f"return {np.mean(mine['return']):.2f} and {np.mean(other['return']):.2f}"
            what = f"PPO outside the environments, per image, beside {name} ({returns})"
            found.append(ratio_row(what, pair, name, "ours", 3.0, ""))
    if pairs := record.get("pairs"):
        found.append(
            ratio_row("weak-to-strong pairs, of the bare UNet's rate", pairs, "bare", "pairs", 95.0, "100 %", " %")
        )
    if seconds := record.get("commands"):
        for name, (_, reach) in COMMANDS.items():
            median = float(np.median(seconds[name]))
            started = float(np.median(seconds["(Python alone)"])) if name == "import noisear_rl" else 0.0
            limits = {"import noisear_rl": "(import gymnasium)", "noisear ppo --help": "(import torch)"}
            limit = f"{np.median(seconds[limits[name]]) - started:.2f} s {limits[name]}" if name in limits else ""
            if not name.startswith("("):
                value = median - started
                found.append(row(f"`{name}`", value, f"{value:.2f} s", reach, limit, "≤", " s"))
    if memory := record.get("memory"):
        what = f"PPO at published size, {bench_policy.EPISODES} episodes, peak memory of the process"
        found.append(row(what, memory, f"{memory:.2f} GiB", 4.5, "3.5 GiB: nine vectors of parameters", "≤", " GiB"))
    return found


def natural_rows(natural: dict[str, list[list[float]]]) -> list[list[str]]:
    """Rows of the natural step beside Adam's at the best of its learning rates."""
    total = {name: sum(seconds for seconds, *_ in runs) for name, runs in natural.items()}
    best = min((name for name in total if name.startswith("adam")), key=total.__getitem__)
    shown = ", ".join(
        f"{name}: {np.mean([run[0] for run in runs]):.0f} s, {np.mean([run[1] for run in runs]):.1f} updates"
        + (f" ({sum(1 for run in runs if not run[2])} of {len(runs)} never)" if not all(run[2] for run in runs) else "")
        for name, runs in natural.items()
    )
    ratio = total[best] / total["natural"]
    more = "" if all(reached for *_, reached in natural[best]) else "more than "  # Adam's time is a lower bound
    what = f"time to +{100 * bench_loops.GAIN:g} points on hard captions, Adam over natural, fixed steps ({shown})"
    return [row(what, ratio, f"{more}{ratio:.1f}×", 2.0, "", unit="×")]


def profile_parts(profiles: dict[str, dict[str, float]]) -> list[str]:
    """The three largest costs of each loop, and what was done about them."""
    parts = []
    for name, costs in profiles.items():
        total = sum(costs.values())
        largest = sorted(costs.items(), key=lambda cost: -cost[1])[:3]
        lines = [[part, f"{100 * s / total:.0f} %", f"{1000 * s:.0f}", DONE[name].get(part, "")] for part, s in largest]
        title = {"rollout": "A rollout", "PPO": "An update of PPO"}[name]
        parts += [
            f"{title} of {bench_loops.ENVS} images takes {total:.2f} CPU seconds. Its three largest costs:",
            markdown(("cost", "share", "CPU milliseconds", "what was done"), lines),
        ]
    return parts


IN_BATCHES = "one batch for all environments; a one-step student; prompts are embedded once"
SCORED = "one batch; a prompt's features are computed once"
DONE = {
    "rollout": {
        "denoising": IN_BATCHES,
        "scoring": SCORED,
        "rest": "observations share the text of their episode instead of copying it at each step",
    },
    "PPO": {
        "denoising": IN_BATCHES,
        "scoring": SCORED,
        "natural steps": "the metric on a quarter of the episodes, four iterations, one graph for all products",
        "gradients": "one pass over all patches by teacher forcing",
        "drawing patches": "keys and values are kept, text is projected once, heads read the last token",
    },
}


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    parts = [
        f"Medians of {record['repeats']} repetitions (smallest to largest), CPU seconds of one thread. Trainings: "
        "2 training seeds.",
        markdown(HEAD, rows(record)),
    ]
    if sampling := record.get("sampling"):
        worst = max(sampling["difference"].values())
        parts.append(
            "Sampling is that of the authors' architecture at its published size. In float32 all patches equal those "
            f"of the authors' loop within 0.001; in bfloat16 they differ by at most {worst:.3f} of their standard "
            "deviation."
        )
    if record.get("scaling"):
        narrow = f"width {bench_scaling.WIDTH}, SDXL's latents"
        parts.append(
            f"![Cost by batch, patches, text length and processes](bench.png)\n\nCost of a policy of {narrow}; "
            f"by default 16 patches, 77 tokens, batches of {bench_scaling.FEW}."
        )
    if record.get("profiles"):
        parts += profile_parts(record["profiles"])
    return page(parts, "bench", record["provenance"])


def main() -> None:
    """Entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="repetitions; fewer training seeds, too, below 3")
    parser.add_argument("--only", nargs="*", choices=list(measured(1)), help="what to measure; unset for everything")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.render:
        known = arguments.only and (RESULTS / "bench.json").exists()
        record = read_record(RESULTS / "bench.json") if known else {}
        record |= {"provenance": provenance(), "repeats": arguments.repeats}
        for name, measure in measured(arguments.repeats).items():
            if not arguments.only or name in arguments.only:
                print(name, flush=True)
                record[name] = measure()
                write("bench", table, record)  # what is done is not lost
    else:
        write("bench", table, None)
    drawn = read_record(RESULTS / "bench.json")
    if "scaling" in drawn and "processes" in drawn:
        bench_scaling.figure(RESULTS / "bench.png", drawn["scaling"], drawn["processes"])


if __name__ == "__main__":
    main()
