"""``noisear table``: our own layout, and the layouts of the paper (NoiseAR, arXiv 2506.01337) with its numbers.

    noisear table runs/evaluate
    noisear table runs/drawbench runs/geneval --table 1 --format latex -o table1.tex
    noisear table patch_size=2:runs/patch2 patch_size=4:runs/patch4 --table 4

Each row is a group: a method with its training seeds. `results` shows means over categories with 95 % intervals; the
columns of the paper are means over all images. In CSV, every number has its
own column; missing numbers are empty.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from noisear_rl.command import run_script
from noisear_rl.config import check_config, parse_config
from noisear_rl.evaluation.intervals import Resample, preference_probability, win_rate
from noisear_rl.evaluation.results import Results
from noisear_rl.evaluation.tables import (
    DATASET,
    DENOISER,
    METHOD,
    PREFERENCES,
    Column,
    Format,
    Row,
    compared,
    corrected,
    describe,
    interval_note,
    judged,
    load,
    render,
    results_table,
    scale_of,
    scorers,
)
from noisear_rl.files import write_atomically

PAPER = Path(__file__).parents[1] / "assets" / "paper"
PAPER_SCORERS = {  # column of the published file: title, our scorers of that kind (the first available is shown)
    "hpsv2": ("HPSv2↑", ("hpsv2.1", "hpsv2")),
    "aesthetic": ("AES↑", ("aesthetic", "aesthetic-v1", "aesthetic-v2")),
    "pickscore_pct": ("PickScore↑ (%)", ("pickscore",)),
    "imagereward_x100": ("ImageReward↑ (×100)", ("image-reward",)),
    "clipscore_pct": ("CLIPScore↑ (%)", ("clip-score",)),
    "mps_pct": ("MPS↑ (%)", ("mps",)),
}
PAPER_COST = (("SDXL", "denoising (paper)", 15.0, 2600.0), ("SDXL", "NoiseAR (paper)", 0.03, 23.12))  # Table 3
PUBLISHED = "(paper): as published, arXiv 2506.01337; (ours): measured here."
WINS = (
    "PickScore and MPS (ours): mean probability of being preferred to Gaussian noise with the same prompt and seed, "
    "very likely what the paper prints (none of its values on DrawBench is a share of 200); wins: a tie is half a win."
)
HPS = "The paper's HPSv2 column fits version 2.1: version 2.0 hardly exceeds 29."
NOTES = {
    "hpsv2": HPS,
    "pickscore": WINS,
    "mps": WINS,
    "clip-score": "CLIPScore (ours): 250 × cosine by default; theirs is unknown.",
}
ABLATION, VALUE = Column("ablation", "text"), Column("value", "text")


@dataclass
class TableConfig:
    """Options of tables."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders that `noisear evaluate` wrote; for table 4 as NAME=VALUE:FOLDER, such as `patch_size=4:runs/patch4`.
    Without folders, tables 1 to 4 show only the published numbers."""
    table: Literal["results", "1", "2", "3", "4"] = "results"
    """Our own layout, or a table of the paper: 1 and 2 for scores, 3 for cost, 4 for ablations."""
    format: Format = "markdown"
    """Output format."""
    resample: Resample = "prompts"
    """Intervals for new `prompts` like these, or for new `noise` on the same prompts."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write; unset to print the table."""

    def __post_init__(self) -> None:
        check_config(self)


def paper_cells(results: Results, group: str, names: Sequence[str]) -> Row:
    """Returns our scores in the columns of the paper; preferences add a column with their wins."""
    row: Row = {}
    for title, kinds in (PAPER_SCORERS[name] for name in names):
        scorer = next((kind for kind in kinds if kind in scorers(results)), None)
        if scorer in PREFERENCES:
            for ending, compare in (("↑", preference_probability), (" wins↑", win_rate)):
                value = compared(results, group, scorer, compare).mean()
                row[Column(title.replace("↑", ending))] = float(value)
        elif scorer:
            row[Column(title)] = scale_of(results, scorer)[0] * float(results.by_seed(group, scorer).mean())
    return row


def paper_name(name: str, column: str) -> str:
    """Returns the paper's name for a denoiser or prompt set that starts like ours, or our name if there is none."""
    fold = lambda text: re.sub(r"[^a-z0-9]", "", text.lower())
    mine = fold(Path(name).name.removesuffix(".txt"))
    known = (row[column] for row in published("tables.csv"))
    return next((other for other in known if len(mine) >= 4 and fold(other).startswith(mine)), name)


def published(name: str) -> list[dict[str, str]]:
    """Reads the rows of a file of published numbers."""
    return list(csv.DictReader((PAPER / name).read_text().splitlines()))


def paper_notes(runs: Sequence[Results], names: Sequence[str]) -> list[str]:
    """Returns the notes that a reader needs to compare our scores with the paper."""
    shown = [kind for results in runs for name in names for kind in PAPER_SCORERS[name][1] if kind in scorers(results)]
    found = f" Scorers: {', '.join(dict.fromkeys(shown))}." if shown else ""
    return [PUBLISHED + found, *dict.fromkeys(NOTES[kind] for kind in shown if kind in NOTES)]


def score_table(runs: Sequence[Results], table: Literal["1", "2"]) -> tuple[list[Row], list[str]]:
    """Returns rows and notes of tables 1 and 2: dataset × denoiser × method."""
    rows: list[Row] = []
    for row in published("tables.csv"):
        if row["table"] == table:
            place: Row = {DATASET: row["dataset"], DENOISER: row["denoiser"], METHOD: f"{row['method']} (paper)"}
            rows.append(place | {Column(title): float(row[name]) for name, (title, _) in PAPER_SCORERS.items()})
    for results in runs:
        place = {DATASET: paper_name(results.prompt_set, "dataset"), DENOISER: paper_name(results.denoiser, "denoiser")}
        for group in results.groups:
            rows.append(place | {METHOD: f"{group} (ours)"} | paper_cells(results, group, list(PAPER_SCORERS)))
    return together(rows, (DATASET, DENOISER)), paper_notes(runs, list(PAPER_SCORERS))


def together(rows: Sequence[Row], keys: Sequence[Column]) -> list[Row]:
    """Groups rows with equal keys, in order of first appearance."""
    order = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    return sorted(rows, key=lambda row: order.index(tuple(row[key] for key in keys)))


def cost_table(runs: Sequence[Results]) -> tuple[list[Row], list[str]]:
    """Returns rows and notes of table 3: the cost per image."""
    nfe, time, flops = Column("NFE", digits=None), Column("seconds per image", digits=3), Column("GFLOPs per image")
    rows: list[Row] = [{DENOISER: d, METHOD: m, nfe: None, time: t, flops: f} for d, m, t, f in PAPER_COST]
    notes = [f"{PUBLISHED} Our times: sampling and denoising, without scoring."]
    for results in runs:
        timing = results.seconds_per_image()
        for group, names in results.groups.items():
            row: Row = {DENOISER: paper_name(results.denoiser, "denoiser"), METHOD: f"{group} (ours)"}
            row[nfe] = float(np.mean([results.methods[name].nfe for name in names]))
            row[time] = float(np.mean([timing[name] for name in names])) if set(names) <= set(timing) else None
            rows.append(row)
        notes.append(f"{describe(results)}, device {results.provenance.get('device', 'unknown')}.")
    return rows, notes


def ablation_table(ablations: Sequence[str], resample: Resample) -> tuple[list[Row], list[str]]:
    """Returns rows and notes of table 4: the published ablations, then ours, each given as NAME=VALUE:FOLDER."""
    names, table = ("clipscore_pct", "imagereward_x100"), published("ablations.csv")
    rows: list[Row] = []
    for row in table:
        value = row["value"] + (" (default)" if row["note"] == "default" else "")
        place: Row = {ABLATION: row["ablation"], VALUE: value, METHOD: "NoiseAR (paper)"}
        rows.append(place | {Column(PAPER_SCORERS[name][0]): float(row[name]) for name in names})
    notes = [f"{row['ablation']} (paper): {row['note']}." for row in table if row["note"] not in ("", "default")]
    runs = []
    for item in ablations:
        if not (parts := re.fullmatch(r"([^=:]+)=([^:]+):(.+)", item)):
            raise ValueError(f"table 4 takes NAME=VALUE:FOLDER, such as patch_size=4:runs/patch4, not {item!r}")
        runs.append(load(parts[3]))
        for group in runs[-1].groups:
            place = {ABLATION: parts[1], VALUE: parts[2], METHOD: f"{group} (ours)"}
            judge = judged(runs[-1], group, ("judge", "gain"), resample)
            rows.append(place | paper_cells(runs[-1], group, names) | judge)
        notes.append(f"{parts[1]} {parts[2]} (ours): {describe(runs[-1])}.")
    rows, comparisons = corrected(rows)
    intervals = [interval_note(runs, resample, comparisons)] if runs else []
    return together(rows, (ABLATION,)), [*paper_notes(runs, names), *notes, *intervals]


def make_table(config: TableConfig) -> str:
    """Formats the requested table; the same folders give the same text.

    Raises:
        FileNotFoundError: If a folder holds no results.
        ValueError: If results are damaged, or the options are incompatible.
    """
    if config.table == "results" and not config.runs:
        raise ValueError("expected the folder of an evaluation, such as: noisear table runs/evaluate")
    if config.table == "4":
        return render(*ablation_table(config.runs, config.resample), config.format)
    runs = [load(folder) for folder in config.runs]
    if config.table == "results":
        return render(*results_table(runs, config.resample), config.format)
    return render(*(cost_table(runs) if config.table == "3" else score_table(runs, config.table)), config.format)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(TableConfig, argv, __doc__)
    text = make_table(config)
    if config.output is None:
        print(text, end="")
    else:
        write_atomically(config.output, text)
        print(f"table: {config.output}")


if __name__ == "__main__":
    run_script(main)
