"""Tables of evaluations: our own layout, and the layouts of the paper (NoiseAR, arXiv 2506.01337) beside its numbers.

    noisear table runs/evaluate
    noisear table runs/drawbench runs/geneval --table 1 --format latex -o table1.tex
    noisear table patch_size=2:runs/patch2 patch_size=4:runs/patch4 --table 4

A row is a group: training seeds of one method are averaged for each prompt and sample. `results` gives means over
categories with 95 % intervals; the paper's columns are means over all pictures. In CSV every number has a column of
its own, and a missing one is empty.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from noisear_rl.evaluation import intervals as statistics
from noisear_rl.evaluation.results import Results, load_results
from noisear_rl.evaluation.intervals import Estimate, category_mean, number, preference_probability, win_rate
from noisear_rl.learning.run import parse_config, write_atomically

PAPER = Path(__file__).parent / "assets" / "paper"
PREFERENCES = ("pickscore", "mps", "shapes-clip")  # scores whose softmax over two pictures is a preference
TIMES_100 = ("hpsv2", "hpsv2.1", "image-reward", "clip-score")  # printed so, as in the paper
PAPER_SCORERS = {  # column of the published file: title, our scorers of that kind (the first at hand is shown)
    "hpsv2": ("HPSv2↑", ("hpsv2", "hpsv2.1")),
    "aesthetic": ("AES↑", ("aesthetic", "aesthetic-v1", "aesthetic-v2")),
    "pickscore_pct": ("PickScore↑ (%)", ("pickscore",)),
    "imagereward_x100": ("ImageReward↑ (×100)", ("image-reward",)),
    "clipscore_pct": ("CLIPScore↑ (%)", ("clip-score",)),
    "mps_pct": ("MPS↑ (%)", ("mps",)),
}
PAPER_COST = (("SDXL", "denoising (paper)", 15.0, 2600.0), ("SDXL", "NoiseAR (paper)", 0.03, 23.12))  # Table 3
PUBLISHED = "(paper): as published, arXiv 2506.01337; (ours): measured here."
WINS = (
    "PickScore and MPS (ours): wins over Gaussian noise with the same prompt and seed, ties counted half; prob.: mean "
    "preference probability. It is not known which of them the paper prints."
)
NOTES = {"pickscore": WINS, "mps": WINS, "clip-score": "CLIPScore (ours): 250 × cosine by default; theirs is unknown."}
ENDINGS = {"estimate": ("", " low", " high"), "gain": ("", " low", " high", " excludes 0")}  # of titles in CSV
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"–": "--", "↑": r"$\uparrow$", "×": r"$\times$", "[": "{[}"}  # a bracket after \\ would be an option
)


@dataclass
class TableConfig:
    """Options of tables."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders that `noisear evaluate` wrote, for table 4 as NAME=VALUE:FOLDER, such as `patch_size=4:runs/patch4`.
    Without any, tables 1 to 4 give the published numbers alone."""
    table: Literal["results", "1", "2", "3", "4"] = "results"
    """Our own layout, or the paper's: 1 and 2 scores, 3 cost, 4 ablations."""
    format: Literal["markdown", "latex", "csv"] = "markdown"
    """How to write it."""
    resample: str = "prompts"
    """Intervals for new `prompts` like these, or for new `noise` on these very prompts."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write; unset to print."""


@dataclass(frozen=True)
class Column:
    """A column: its title, what its cells are, and decimals (``None`` for as many as are needed)."""

    title: str
    kind: Literal["text", "number", "estimate", "gain"] = "number"
    digits: int | None = 2


Cell = str | float | Estimate | None
Row = dict[Column, Cell]
DATASET, DENOISER, METHOD = (Column(title, "text") for title in ("dataset", "denoiser", "method"))
ABLATION, VALUE, SEEDS = Column("ablation", "text"), Column("value", "text"), Column("training seeds", digits=None)


def cell_text(cell: Cell, column: Column) -> str:
    """A cell for people."""
    if isinstance(cell, Estimate):
        gain = column.kind == "gain"
        return cell.text(column.digits or 0, "+" if gain else "") + (statistics.significance_mark(cell) if gain else "")
    return cell or "–" if cell is None or isinstance(cell, str) else number(cell, column.digits)


def cell_values(cell: Cell, count: int) -> list[str]:
    """A cell in CSV: this many values, plain numbers or empty."""
    if isinstance(cell, Estimate):
        bounds = ["" if math.isnan(bound) else number(bound, None) for bound in (cell.low, cell.high)]
        return [number(cell.mean, None), *bounds, str(len(statistics.significance_mark(cell)))][:count]
    text = cell or "" if cell is None or isinstance(cell, str) else number(cell, None)
    return [text] + [""] * (count - 1)


def latex_cell(cell: Cell, column: Column) -> str:
    """A cell in LaTeX: text escaped, numbers with real minus signs and raised marks."""
    text = cell_text(cell, column)
    if column.kind == "text":
        return text.translate(LATEX)
    return re.sub(r"-(?=\d)", "$-$", text).replace("*", "$^{*}$").replace("–", "--")


def render(rows: Sequence[Row], notes: Sequence[str], form: str) -> str:
    """A table in a format; its columns are those of all rows, in order of appearance. CSV takes no notes."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    titles = [column.title for column in columns]
    if form == "csv":
        file, endings = io.StringIO(), [ENDINGS.get(column.kind, ("",)) for column in columns]
        lines = [[title + end for title, ends in zip(titles, endings, strict=True) for end in ends]]
        for row in rows:
            cells = (cell_values(row.get(c), len(ends)) for c, ends in zip(columns, endings, strict=True))
            lines.append([value for cell in cells for value in cell])
        csv.writer(file, lineterminator="\n").writerows(lines)
        return file.getvalue()
    if form == "latex":
        kinds = "".join("l" if column.kind == "text" else "r" for column in columns)
        head = " & ".join(title.translate(LATEX) for title in titles)
        body = "".join(" & ".join(latex_cell(row.get(c), c) for c in columns) + " \\\\\n" for row in rows)
        text = f"\\toprule\n{head} \\\\\n\\midrule\n{body}\\bottomrule\n"
        below = "".join(f"\\par{{\\footnotesize {note.translate(LATEX)}}}\n" for note in notes)
        return f"\\begin{{tabular}}{{{kinds}}}\n{text}\\end{{tabular}}\n{below}"
    lines = [titles, ["---"] * len(titles), *([cell_text(row.get(c), c) for c in columns] for row in rows)]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n\n".join([text, *notes]) + "\n"


def load(folder: str) -> Results:
    """Reads an evaluation; ``ValueError`` if the judge or a picture lacks a score. See also :func:`load_results`."""
    results = load_results(folder)
    expected = (len(results.prompts), results.samples)
    if not results.methods or len(results.categories) != expected[0]:
        raise ValueError(f"{folder}: expected methods, and a category for each of the {expected[0]} prompts")
    for name, method in results.methods.items():
        wrong = [scorer for scorer, scores in method.scores.items() if scores.shape != expected]
        if wrong or results.judge not in method.scores:
            raise ValueError(f"{folder}: expected {expected} scores of {name!r} by {(wrong or [results.judge])[0]!r}")
    return results


def scorers(results: Results) -> list[str]:
    """Scorers that every method has, the judge first."""
    common = [name for name in results.methods[results.baseline].scores if name != results.judge]
    return [results.judge, *(s for s in common if all(s in method.scores for method in results.methods.values()))]


def compared(results: Results, group: str, scorer: str, compare: Callable[..., np.ndarray]) -> np.ndarray:
    """Compares every seed of a group with the baseline, picture by picture: ``(P, S)`` in %, the mean over seeds."""
    baseline = results.methods[results.baseline].scores[scorer]
    seeds = [compare(results.methods[name].scores[scorer], baseline) for name in results.groups[group]]
    return 100 * np.mean(seeds, axis=0)


def scale_of(results: Results, scorer: str) -> tuple[float, str]:
    """A scorer's factor and unit: as the paper prints it, percent for a judge in [0, 1], or its own."""
    if scorer in TIMES_100:
        return 100.0, " (×100)"
    share = all(((m.scores[scorer] >= 0) & (m.scores[scorer] <= 1)).all() for m in results.methods.values())
    return (100.0, " (%)") if scorer == results.judge and share else (1.0, "")


def judged(results: Results, group: str, titles: tuple[str, str], resample: str) -> Row:
    """The judge's mean and the gain over the baseline, under these titles; the baseline itself has no gain."""
    factor, categories = scale_of(results, results.judge)[0], results.categories
    scores, start = factor * results.pooled(group, results.judge), results.methods[results.baseline]
    row: Row = {Column(titles[0], "estimate", 1): statistics.bootstrap(scores, categories, resample=resample)}
    gain = statistics.paired_difference(scores, factor * start.scores[results.judge], categories, resample=resample)
    return row | {Column(titles[1], "gain", 1): None if group == start.group else gain}


def describe(results: Results) -> str:
    """What an evaluation is of."""
    size = f"{len(results.prompts)} prompts × {results.samples} samples, denoiser {results.denoiser}"
    judge = f"judge {results.judge}{scale_of(results, results.judge)[1]}"
    return f"{results.prompt_set}: {size}, {judge}, baseline {results.baseline}"


def results_row(results: Results, group: str, resample: str) -> Row:
    """A group's row of our own layout."""
    members, start = [results.methods[name] for name in results.groups[group]], results.methods[results.baseline]
    (judge, *others), categories = scorers(results), results.categories
    scale, unit = scale_of(results, judge)
    row: Row = {DATASET: results.prompt_set, DENOISER: results.denoiser, METHOD: group}
    row |= judged(results, group, (f"{judge}{unit}", f"gain{unit}"), resample)
    if len(set(categories)) > 1:
        means = statistics.category_means(scale * results.pooled(group, judge), categories)
        row |= {Column(f"{name}{unit}", digits=1): value for name, value in means.items()}
    for scorer in [judge, *(name for name in others if name in PREFERENCES)]:
        for title, compare in (("wins", win_rate), ("prob.", preference_probability)):
            if title == "wins" or scorer in PREFERENCES:
                value = category_mean(compared(results, group, scorer, compare), categories)
                row[Column(f"{scorer} {title} (%)", digits=1)] = value
    for scorer in others:
        factor, of = scale_of(results, scorer)
        row[Column(f"{scorer}{of}")] = category_mean(factor * results.pooled(group, scorer), categories)
    for name in [name for name in start.diversity if all(name in member.diversity for member in members)]:
        own, of_start = np.mean([member.diversity[name] for member in members]), start.diversity[name].mean()
        row[Column(f"diversity by {name} (baseline 1)")] = float(own / of_start) if of_start > 0 else None
    mean_of = lambda fact: float(np.mean([getattr(member, fact) for member in members]))
    known = all(member.kl_to_gaussian is not None for member in members)
    row[Column("KL (nats)", digits=1)] = mean_of("kl_to_gaussian") if known else None
    for title, digits in (("noise mean", 3), ("noise std", 3), ("NFE", None)):
        row[Column(title, digits=digits)] = mean_of(title.lower().replace(" ", "_"))
    row[SEEDS] = len(members) if group != start.group and members[0].trained else None
    seeds = [category_mean(scale * member.scores[judge], categories) for member in members]
    row[Column("std of seeds", digits=1)] = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
    return row


def results_table(runs: Sequence[Results], resample: str) -> tuple[list[Row], list[str]]:
    """Our own layout: a row a group of every evaluation."""
    rows = [results_row(results, group, resample) for results in runs for group in results.groups]
    if len(runs) == 1:  # the note says it
        rows = [{c: cell for c, cell in row.items() if c not in (DATASET, DENOISER)} for row in rows]
    interval = f"In brackets: 95 % intervals over {resample}, the gain's paired; * excludes 0. Wins count ties half."
    return rows, [*(f"{describe(results)}." for results in runs), interval]


def paper_cells(results: Results, group: str, names: Sequence[str]) -> Row:
    """Ours in columns of the paper; preferences have their mean probability in a column of its own."""
    row: Row = {}
    for title, kinds in (PAPER_SCORERS[name] for name in names):
        scorer = next((kind for kind in kinds if kind in scorers(results)), None)
        if scorer in PREFERENCES:
            for ending, compare in (("↑", win_rate), (" prob.↑", preference_probability)):
                value = compared(results, group, scorer, compare).mean()
                row[Column(title.replace("↑", ending))] = float(value)
        elif scorer:
            row[Column(title)] = scale_of(results, scorer)[0] * float(results.pooled(group, scorer).mean())
    return row


def paper_name(name: str, column: str) -> str:
    """The paper's name for a denoiser or prompt set that starts like ours; ours where it has none."""
    fold = lambda text: re.sub(r"[^a-z0-9]", "", text.lower())
    mine = fold(Path(name).name.removesuffix(".txt"))
    known = (row[column] for row in published("tables.csv"))
    return next((other for other in known if len(mine) >= 4 and fold(other).startswith(mine)), name)


def published(name: str) -> list[dict[str, str]]:
    """Rows of a file of published numbers."""
    return list(csv.DictReader((PAPER / name).read_text().splitlines()))


def paper_notes(runs: Sequence[Results], names: Sequence[str]) -> list[str]:
    """What a reader must know to compare our scores with the paper's."""
    shown = [kind for results in runs for name in names for kind in PAPER_SCORERS[name][1] if kind in scorers(results)]
    found = f" Scorers: {', '.join(dict.fromkeys(shown))}." if shown else ""
    return [PUBLISHED + found, *dict.fromkeys(NOTES[kind] for kind in shown if kind in NOTES)]


def score_table(runs: Sequence[Results], table: str) -> tuple[list[Row], list[str]]:
    """Tables 1 and 2: dataset × denoiser × method."""
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
    """Rows with equal keys one below the other, in the order of their first."""
    order = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    return sorted(rows, key=lambda row: order.index(tuple(row[key] for key in keys)))


def cost_table(runs: Sequence[Results]) -> tuple[list[Row], list[str]]:
    """Table 3: what an image costs."""
    nfe, time, flops = Column("NFE", digits=None), Column("seconds an image", digits=3), Column("GFLOPs an image")
    rows: list[Row] = [{DENOISER: d, METHOD: m, nfe: None, time: t, flops: f} for d, m, t, f in PAPER_COST]
    notes = [f"{PUBLISHED} Time of ours: sampling and denoising, without scoring."]
    for results in runs:
        timing = results.seconds_per_image()
        for group, names in results.groups.items():
            row: Row = {DENOISER: paper_name(results.denoiser, "denoiser"), METHOD: f"{group} (ours)"}
            row[nfe] = float(np.mean([results.methods[name].nfe for name in names]))
            row[time] = float(np.mean([timing[name] for name in names])) if set(names) <= set(timing) else None
            rows.append(row)
        notes.append(f"{describe(results)}, device {results.provenance.get('device', 'unknown')}.")
    return rows, notes


def ablation_table(ablations: Sequence[str], resample: str) -> tuple[list[Row], list[str]]:
    """Table 4: the published ablations and ours, NAME=VALUE:FOLDER each, below them."""
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
    return together(rows, (ABLATION,)), [*paper_notes(runs, names), *notes]


def make_table(config: TableConfig) -> str:
    """The table that a configuration asks for; the same folders give the same text.

    Raises:
        FileNotFoundError: If a folder holds no results.
        ValueError: If results are damaged, or the options do not go together.
    """
    if config.table == "results" and not config.runs:
        raise ValueError("say which evaluation: noisear table runs/evaluate")
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
    main()
