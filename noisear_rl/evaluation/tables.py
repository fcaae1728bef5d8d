"""Tables of evaluations in our own layout, as Markdown, LaTeX and CSV.

Each row is a group: a method with its training seeds. Columns are means over categories with 95 % intervals, which
cover new prompts and, where there are several, a new training seed. In CSV, every number has its own column; missing
numbers are empty.

Shapes: ``T`` training seeds, ``P`` prompts, ``S`` samples per prompt.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from noisear_rl.evaluation import intervals
from noisear_rl.evaluation.intervals import (
    Estimate,
    Resample,
    category_mean,
    number,
    preference_probability,
    win_rate,
)
from noisear_rl.evaluation.results import Results, load_results

Format = Literal["markdown", "latex", "csv"]
PREFERENCES = ("pickscore", "mps", "shapes-clip")  # scores whose softmax over two images is a preference
TIMES_100 = ("hpsv2", "hpsv2.1", "image-reward", "clip-score")  # printed times 100, as in the paper
ENDINGS = {  # suffixes of CSV titles
    "estimate": ("", " low", " high"),
    "gain": ("", " low", " high", " excludes 0", " p", " adjusted p"),
}
UNADJUSTED = 5  # comparisons in a table that are marked without a correction
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"–": "--", "↑": r"$\uparrow$", "×": r"$\times$", "[": "{[}"}  # \\ takes a bracket as an option
)


@dataclass(frozen=True)
class Column:
    """A column: its title, the kind of its cells, and their decimals (``None`` for as many as needed)."""

    title: str
    kind: Literal["text", "number", "estimate", "gain"] = "number"
    digits: int | None = 2


Cell = str | float | Estimate | None
Row = dict[Column, Cell]
DATASET, DENOISER, METHOD = (Column(title, "text") for title in ("dataset", "denoiser", "method"))
SEEDS = Column("training seeds", digits=None)


def cell_text(cell: Cell, column: Column) -> str:
    """Formats a cell for Markdown."""
    if isinstance(cell, Estimate):
        gain = column.kind == "gain"
        return cell.text(column.digits or 0, "+" if gain else "") + (intervals.significance_mark(cell) if gain else "")
    if cell is None or isinstance(cell, str):
        return _plain_line(cell or "–")
    return number(cell, column.digits)


def cell_values(cell: Cell, count: int) -> list[str]:
    """Formats a cell for CSV as ``count`` values, each a plain number or empty."""
    if isinstance(cell, Estimate):
        low, high, p, adjusted = (
            "" if math.isnan(value) else number(value, None) for value in (cell.low, cell.high, cell.p, cell.adjusted)
        )
        return [number(cell.mean, None), low, high, str(int(cell.excludes_zero)), p, adjusted][:count]
    text = _inert(cell or "") if cell is None or isinstance(cell, str) else number(cell, None)
    return [text] + [""] * (count - 1)


def _inert(text: str) -> str:
    """One line of text that a spreadsheet does not take for a formula."""
    line = _plain_line(text)
    return f"'{line}" if line.lstrip().startswith(tuple("=+-@")) else line


def _plain_line(text: str) -> str:
    """Text without line breaks and control characters, for one line of a table."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def latex_cell(cell: Cell, column: Column) -> str:
    """Formats a cell for LaTeX: escaped text, numbers with proper minus signs and raised marks."""
    text = cell_text(cell, column)
    if column.kind == "text" or isinstance(cell, str):
        return text.translate(LATEX)
    return re.sub(r"-(?=\d)", "$-$", text).replace("*", "$^{*}$").replace("–", "--")


def render(rows: Sequence[Row], notes: Sequence[str], form: Format) -> str:
    """Formats a table with the columns of all rows, in order of appearance; CSV omits the notes."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    titles, notes = [_plain_line(column.title) for column in columns], [_plain_line(note) for note in notes]
    if form == "csv":
        file, endings = io.StringIO(), [ENDINGS.get(column.kind, ("",)) for column in columns]
        lines = [[_inert(title + end) for title, ends in zip(titles, endings, strict=True) for end in ends]]
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
    """Reads an evaluation and checks that no score is missing.

    Raises:
        FileNotFoundError: If the folder holds no results.
        ValueError: If the results are damaged, or a method, a category or a score is missing.
    """
    results = load_results(folder)
    expected = (len(results.prompts), results.samples)
    if not results.methods or len(results.categories) != expected[0]:
        raise ValueError(f"{folder}: expected methods and one category for each of the {expected[0]} prompts")
    for name, method in results.methods.items():
        wrong = [scorer for scorer, scores in method.scores.items() if scores.shape != expected]
        if wrong or results.judge not in method.scores:
            raise ValueError(f"{folder}: expected {expected} scores of {name!r} by {(wrong or [results.judge])[0]!r}")
    return results


def scorers(results: Results) -> list[str]:
    """Returns the scorers that all methods share, the judge first."""
    common = [name for name in results.methods[results.baseline].scores if name != results.judge]
    return [results.judge, *(s for s in common if all(s in method.scores for method in results.methods.values()))]


def compared(results: Results, group: str, scorer: str, compare: Callable[..., np.ndarray]) -> np.ndarray:
    """Compares each training seed of a group with the baseline, image by image: ``(T, P, S)`` in %."""
    return 100 * compare(results.by_seed(group, scorer), results.methods[results.baseline].scores[scorer])


def scale_of(results: Results, scorer: str) -> tuple[float, str]:
    """Returns the factor and unit of a scorer: as in the paper, percent for a judge in [0, 1], otherwise its own."""
    if scorer in TIMES_100:
        return 100.0, " (×100)"
    share = all(((m.scores[scorer] >= 0) & (m.scores[scorer] <= 1)).all() for m in results.methods.values())
    return (100.0, " (%)") if scorer == results.judge and share else (1.0, "")


def judged(results: Results, group: str, titles: tuple[str, str], resample: Resample) -> Row:
    """Returns the mean of the judge and the gain over the baseline, under ``titles``; the baseline has no gain."""
    factor, prompts, categories = scale_of(results, results.judge)[0], results.prompts, results.categories
    scores, start = factor * results.by_seed(group, results.judge), results.methods[results.baseline]
    estimate = intervals.bootstrap(scores, categories, prompts=prompts, resample=resample)
    row: Row = {Column(titles[0], "estimate", 1): estimate}
    baseline = factor * start.scores[results.judge]
    gain = intervals.paired_difference(scores, baseline, categories, prompts=prompts, resample=resample)
    return row | {Column(titles[1], "gain", 1): None if group == start.group else gain}


def describe(results: Results) -> str:
    """Describes an evaluation in one line: prompts, samples, denoiser, judge and baseline."""
    rows, distinct = len(results.prompts), len(set(results.prompts))
    repeated = "" if distinct == rows else f" in {rows} rows"
    size = f"{distinct} prompts{repeated} × {results.samples} samples, denoiser {results.denoiser}"
    judge = f"judge {results.judge}{scale_of(results, results.judge)[1]}"
    return f"{results.prompt_set}: {size}, {judge}, baseline {results.baseline}"


def results_row(results: Results, group: str, resample: Resample) -> Row:
    """Returns the row of a group in our own layout."""
    members, start = [results.methods[name] for name in results.groups[group]], results.methods[results.baseline]
    (judge, *others), categories, prompts = scorers(results), results.categories, results.prompts
    scale, unit = scale_of(results, judge)
    row: Row = {DATASET: results.prompt_set, DENOISER: results.denoiser, METHOD: group}
    row |= judged(results, group, (f"{judge}{unit}", f"gain{unit}"), resample)
    if len(set(categories)) > 1:
        means = intervals.category_means(scale * results.by_seed(group, judge), categories, prompts)
        row |= {Column(f"{name}{unit}", digits=1): value for name, value in means.items()}
    for scorer in [judge, *(name for name in others if name in PREFERENCES)]:
        for title, compare in (("wins", win_rate), ("prob.", preference_probability)):
            if title == "wins" or scorer in PREFERENCES:
                value = category_mean(compared(results, group, scorer, compare), categories, prompts)
                row[Column(f"{scorer} {title} (%)", digits=1)] = value
    for scorer in others:
        factor, of = scale_of(results, scorer)
        row[Column(f"{scorer}{of}")] = category_mean(factor * results.by_seed(group, scorer), categories, prompts)
    for name in [name for name in start.diversity if all(name in member.diversity for member in members)]:
        own, of_start = np.mean([member.diversity[name] for member in members]), start.diversity[name].mean()
        row[Column(f"diversity by {name} (baseline 1)")] = float(own / of_start) if of_start > 0 else None
    mean_of = lambda fact: float(np.mean([getattr(member, fact) for member in members]))
    known = all(member.kl_to_gaussian is not None for member in members)
    row[Column("KL (nats)", digits=1)] = mean_of("kl_to_gaussian") if known else None
    for title, digits in (("noise mean", 3), ("noise std", 3), ("NFE", None)):
        row[Column(title, digits=digits)] = mean_of(title.lower().replace(" ", "_"))
    row[SEEDS] = len(members) if group != start.group and members[0].trained else None
    seeds = [category_mean(scale * member.scores[judge], categories, prompts) for member in members]
    row[Column("std of seeds", digits=1)] = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
    return row


def corrected(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Applies Holm's correction to the gains of a table that compares more than five.

    Returns:
        The rows, and the number of comparisons corrected for; 0 without a correction.
    """
    places = [
        (i, column)
        for i, row in enumerate(rows)
        for column, cell in row.items()
        if column.kind == "gain" and isinstance(cell, Estimate) and not math.isnan(cell.p)
    ]
    adjusted, found = list(rows), [cell for i, column in places if isinstance(cell := rows[i][column], Estimate)]
    if len(places) <= UNADJUSTED:
        return adjusted, 0
    for (i, column), gain in zip(places, intervals.holm(found), strict=True):
        adjusted[i] = adjusted[i] | {column: gain}
    return adjusted, len(places)


def interval_note(runs: Sequence[Results], resample: Resample, comparisons: int) -> str:
    """Describes what the intervals of a table cover, and its marks.

    Args:
        runs: The evaluations shown.
        resample: What they were resampled over.
        comparisons: Number of comparisons that the marks are corrected for; 0 without a correction.
    """
    groups = [
        (results.methods[names[0]].trained and group != results.methods[results.baseline].group, len(names))
        for results in runs
        for group, names in results.groups.items()
    ]
    over = resample + (" and training seeds" if any(count > 1 for _, count in groups) else "")
    mark = f"excludes 0{f', after Holm correction for {comparisons} comparisons' if comparisons else ''}"
    note = f"In brackets: 95 % intervals over {over}, paired for the gain; * {mark}."
    if any(trained and count == 1 for trained, count in groups):
        note += f" With one training seed, an interval is over {resample} only and does not cover a new training."
    alone = any(
        len(rows) == 1
        for results in runs
        for rows in intervals.rows_by_prompt(results.categories, results.prompts).values()
    )
    return note + (" No interval where a category has a single prompt." if alone and resample == "prompts" else "")


def results_table(runs: Sequence[Results], resample: Resample) -> tuple[list[Row], list[str]]:
    """Returns rows and notes of our own layout: one row per group of every evaluation."""
    rows, comparisons = corrected(
        [results_row(results, group, resample) for results in runs for group in results.groups]
    )
    if len(runs) == 1:  # the note states both
        rows = [{c: cell for c, cell in row.items() if c not in (DATASET, DENOISER)} for row in rows]
    note = interval_note(runs, resample, comparisons)
    return rows, [*(f"{describe(results)}." for results in runs), f"{note} A tie is half a win."]
