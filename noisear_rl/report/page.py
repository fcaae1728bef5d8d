"""A self-contained page about an evaluation: verdict, table, failures first, learning curves, noise.

    noisear report runs/evaluate runs/nll runs/ppo -o report.html

Takes the folder of an evaluation, run folders of trainings, or both, and writes a page that needs no network: styles,
script and images are embedded. Missing parts are omitted, with a line that says why.

Shapes: ``P`` prompts, ``S`` samples per prompt.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import tyro
import yaml
from markupsafe import Markup

from noisear_rl.command import run_script
from noisear_rl.config import NonNegativeInt, PositiveInt, check_config, parse_config
from noisear_rl.evaluation.results import Results
from noisear_rl.evaluation.tables import load
from noisear_rl.files import read_entries, write_atomically
from noisear_rl.integrity import verify_parts
from noisear_rl.learning.records import read_records
from noisear_rl.report import charts as figures
from noisear_rl.report.embed import fit_images
from noisear_rl.report.summary import (
    best_row,
    brief,
    decimals,
    is_binary,
    judge_decimals,
    plain,
    signed,
    table_rows,
    verdict,
)

ASSETS = Path(__file__).parents[1] / "assets" / "report"


@dataclass
class ReportConfig:
    """Options of the report."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folder of an evaluation (at most one) and run folders of trainings."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """HTML file to write."""
    title: str = ""
    """Title; unset for the name of the denoiser."""
    max_images: NonNegativeInt = 500
    """Largest number of images on the page; prompts that fail most come first."""
    images_per_cell: PositiveInt = 4
    """Images per prompt and method."""

    def __post_init__(self) -> None:
        check_config(self)


@dataclass
class Training:
    """A training run: its name, its log records, its configuration as YAML, and the provenance of its starts."""

    name: str
    records: list[dict[str, Any]]
    config: str
    starts: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """The name without the training seed, shared by runs that differ only in their seed."""
        return re.sub(r"[-_. ](seed[-_. ]?)?\d+$", "", self.name) or self.name


def load_runs(folders: Sequence[Path]) -> tuple[Results | None, list[Training]]:
    """Reads the folders of evaluations and trainings, recognised by their files.

    Raises:
        FileNotFoundError: If a folder is neither.
        ValueError: If there is no folder, more than one evaluation, or a damaged file.
    """
    if not folders:
        raise ValueError("expected the folder of an evaluation or of a training run: noisear report RUN... -o FILE")
    results, trainings = None, []
    for folder in folders:
        if (folder / "results.json").is_file():
            if results is not None:
                raise ValueError(
                    f"a page shows one evaluation, got {results.folder} and {folder}: write a page for each"
                )
            results = load(str(folder))
            verify_parts(folder, "noise-", "remove it and run the same `noisear evaluate` command again")
        elif (folder / "metrics.jsonl").is_file():
            config = folder / "config.yaml"
            try:
                records = read_records(folder)
            except ValueError as error:
                raise ValueError(
                    f"{folder / 'metrics.jsonl'} is damaged ({error}): resume or repeat the run"
                ) from error
            trainings.append(
                Training(
                    folder.name,
                    records,
                    config.read_text() if config.is_file() else "",
                    read_entries(folder / "provenance.json"),
                )
            )
        else:
            raise FileNotFoundError(
                f"{folder} is not a run folder: expected results.json (noisear evaluate) or metrics.jsonl (a training)"
            )
    return results, trainings


def failures_first(best: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Orders prompts by the score of the best method, lowest first; ties by its gain over the baseline, lowest first.

    Args:
        best: ``(P, S)`` judge scores of the best method.
        baseline: ``(P, S)`` judge scores of the baseline.

    Returns:
        ``(P,)`` indices of prompts.
    """
    mean, gain = best.mean(1), best.mean(1) - baseline.mean(1)
    return np.lexsort((gain, mean))


def choose_images(results: Results, order: Sequence[int], config: ReportConfig) -> list[tuple[int, str, str, int]]:
    """Returns ``(prompt, group, method, sample)`` of the images to show: complete prompts in order, while they fit.

    A cell iterates over the samples and alternates between training seeds; images that are not on disk are skipped.
    """
    groups = results.groups
    chosen: list[tuple[int, str, str, int]] = []
    count = min(config.images_per_cell, max(1, config.max_images // len(groups)))
    for prompt in order:
        row = []
        for group, names in groups.items():
            n = len(names)
            turns = [(names[(sample + turn) % n], sample) for turn in range(n) for sample in range(results.samples)]
            there = [(prompt, group, *turn) for turn in turns if results.image_path(turn[0], prompt, turn[1]).is_file()]
            row += there[:count]
        if len(chosen) + len(row) > config.max_images:
            break
        chosen += row
    return chosen


def failure_cases(
    results: Results, best: str, config: ReportConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns prompts in the order of :func:`failures_first` with their images, and the dialog text of each image."""
    binary, groups, judge, seed = is_binary(results), results.groups, results.judge, results.config.get("seed")
    order = failures_first(results.pooled(best, judge), results.pooled(next(iter(groups)), judge)).tolist()
    chosen = choose_images(results, order, config)
    images = fit_images([results.image_path(method, prompt, j) for prompt, _, method, j in chosen])
    details: list[dict[str, Any]] = []
    shots: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for index, (prompt, group, method, sample) in enumerate(chosen):
        scores = {name: float(values[prompt, sample]) for name, values in results.methods[method].scores.items()}
        kind = ("right" if scores[judge] > 0.5 else "wrong") if binary else "score"
        mark = {"right": "✓", "wrong": "✗", "score": brief(scores[judge])}[kind]
        said = kind if binary else f"{judge} {mark}"
        alt = f"{results.prompts[prompt]}: {method}, sample {sample}, {said}"
        shot = {"id": index, "image": images[index], "badge": mark, "kind": kind, "alt": alt}
        shots.setdefault((prompt, group), []).append(shot)
        noise_seed = seed + prompt * results.samples + sample if isinstance(seed, int) else None
        details.append(
            {
                "prompt": results.prompts[prompt],
                "category": results.categories[prompt].replace("_", " "),
                "method": method,
                "sample": f"sample {sample}" + (f", noise seed {noise_seed}" if noise_seed is not None else ""),
                "badge": f"{mark} {kind}" if binary else "",
                "kind": kind,
                "scores": [[name, brief(value, 4)] for name, value in scores.items()],
            }
        )
    cases = []
    for prompt in dict.fromkeys(item[0] for item in chosen):
        cells = []
        for color, (group, names) in enumerate(groups.items()):
            values = np.stack([results.methods[name].scores[judge][prompt] for name in names])
            tally = f"{values.sum():.0f} of {values.size} right" if binary else f"mean {brief(values.mean())}"
            cells.append({"group": group, "color": color, "tally": tally, "shots": shots.get((prompt, group), [])})
        cases.append({"prompt": results.prompts[prompt], "category": results.categories[prompt], "cells": cells})
    return cases, details


def command(config: dict[str, Any]) -> str:
    """Returns the ``noisear evaluate`` command line for the options of an evaluation."""
    words = ["noisear", "evaluate"]
    nested = {f"search.{key}": value for key, value in config.get("search", {}).items()}
    for key, value in ({key: value for key, value in config.items() if key != "search"} | nested).items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [flag, *(str(word) for item in value.items() for word in item)] if value else []
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)] if value else []
        elif value is not None:
            words += [flag, str(value)]
    return shlex.join(words)


def evaluation_part(results: Results, config: ReportConfig) -> dict[str, Any]:
    """Returns the values that the template shows of an evaluation."""
    rows, binary = table_rows(results), is_binary(results)
    best = best_row(rows)
    cases, details = failure_cases(results, best.name, config)
    gains = [row.gain for row in rows if row.gain is not None]
    ends = [0.0, *(end for gain in gains for end in (gain.mean, gain.low, gain.high) if np.isfinite(end))]
    limits = (min(ends), max(ends))
    categories, several = list(dict.fromkeys(results.categories)), any(len(row.seeds) > 1 for row in rows)
    counts = {name: sum(case["category"] == name for case in cases) for name in categories}
    return {
        "results": results,
        "rows": rows,
        "best": best,
        "binary": binary,
        "digits": judge_decimals(rows, binary=binary),
        "score_digits": {name: decimals([row.scores.get(name) for row in rows]) for name in rows[0].scores},
        "verdict": verdict(rows, results.judge, binary=binary),
        "over": results.config.get("resample", "prompts") + (" and training seeds" if several else ""),
        "corrected": sum(not math.isnan(gain.adjusted) for gain in gains),
        "marks": {
            row.name: figures.interval_mark(row.gain.mean, row.gain.low, row.gain.high, limits, row.significant)
            for row in rows
            if row.gain is not None and np.isfinite(row.gain.low)
        },
        "categories": categories if len(categories) > 1 else [],
        "counts": {name: count for name, count in counts.items() if count} if len(categories) > 1 else {},
        "cases": cases,
        "widest": min(4, max((len(cell["shots"]) for case in cases for cell in case["cells"]), default=1)),
        "details": details,
        "panels": figures.score_panels(results, binary=binary),
        "noise": figures.noise_panels(results),
        "config": yaml.safe_dump(results.config, sort_keys=False),
        "command": command(results.config),
    }


def render(results: Results | None, trainings: Sequence[Training], config: ReportConfig) -> str:
    """Renders the page as HTML: all text is escaped, and only its own script may run."""
    titles: dict[str, list[list[dict[str, Any]]]] = {}
    for run in trainings:
        titles.setdefault(run.title, []).append(run.records)
    script = (ASSETS / "script.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"plain": plain, "signed": signed, "color": figures.color}
    fallback = f"Initial noise for {results.denoiser}" if results else "Training runs"
    return environment.get_template("page.html").render(
        title=config.title or fallback,
        style=Markup((ASSETS / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        evaluation=evaluation_part(results, config) if results else None,
        learning=figures.learning_panels(titles, list(results.groups) if results else []),
        trainings=trainings,
        report_command=shlex.join(["noisear", "report", *map(str, config.runs), "-o", str(config.output)]),
    )


def write_report(config: ReportConfig) -> Path:
    """Writes the page and returns its path; see the module docstring.

    Raises:
        FileNotFoundError: If a folder is not a run folder.
        ValueError: If a run or an image is damaged, or the options are incompatible.
    """
    write_atomically(config.output, render(*load_runs(config.runs), config))
    return config.output


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    path = write_report(parse_config(ReportConfig, argv, __doc__))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
