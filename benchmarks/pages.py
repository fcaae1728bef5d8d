"""What the scripts of this folder share: training seeds, the command line that writes a page, and table rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from noisear_rl.evaluation.intervals import Estimate, category_means
from noisear_rl.evaluation.results import write_page
from noisear_rl.provenance import provenance

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
SEED_HEAD = (*(f"seed {seed}" for seed in SEEDS), "pooled", "gain", "std of seeds", "KL")  # of `seed_cells`


def publish(
    name: str,
    description: str | None,
    table: Callable[[dict[str, Any]], str],
    measure: Callable[[], Mapping[str, Any]],
    argv: Sequence[str] | None = None,
) -> None:
    """Runs a script without options of its own: measures, or with ``--render`` does not, and writes the page.

    Args:
        name: Name of the script and of its page.
        description: Shown by ``--help``.
        table: Renders the page from its data.
        measure: Returns the data; where the process started is added as ``provenance``.
        argv: Arguments; ``None`` for those of the process.
    """
    parser = parser_of(description)
    start = {"provenance": provenance()}  # before anything is measured: the files may change meanwhile
    write(name, table, None if parser.parse_args(argv).render else start | dict(measure()))


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the option ``--render``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="render the page again from its data and stop")
    return parser


def train_variants(
    description: str | None, names: Iterable[str], train: Callable[[str, int], None]
) -> argparse.Namespace:
    """Trains every variant with every training seed, or with ``--train I N`` every N-th of these runs from I.

    Args:
        description: Shown by ``--help``.
        names: Names of the variants.
        train: Trains a variant with a training seed; a finished run returns immediately.

    Returns:
        The arguments of the process, ``render`` and ``train``; nothing was trained if the page is only rendered.
    """
    parser = parser_of(description)
    parser.add_argument("--train", type=int, nargs=2, metavar=("I", "N"), help="train runs I, I+N, I+2N, … and stop")
    arguments = parser.parse_args()
    if not arguments.render:
        first, step = arguments.train or (0, 1)
        for name, seed in [(name, seed) for name in names for seed in SEEDS][first::step]:
            train(name, seed)
    return arguments


def write(name: str, table: Callable[[dict[str, Any]], str], record: Mapping[str, Any] | None) -> None:
    """Writes and prints a page, with its data if they are new."""
    print(write_page(RESULTS / f"{name}.md", table, record))


def page(parts: Sequence[str], name: str, origin: Mapping[str, Any]) -> str:
    """Returns the parts of a page, paragraphs and tables, and below them the command and its provenance."""
    return "\n\n".join([*parts, f"Command: `python benchmarks/{name}.py`. {dict(origin)}"]) + "\n"


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Formats a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in cells) + " |" for cells in lines)


def signed(estimate: Estimate) -> str:
    """Formats the estimate of a difference with its sign."""
    return estimate.text(1, "+")


def seed_cells(
    scores: np.ndarray, baseline: np.ndarray | None, estimate: Callable[[np.ndarray], Estimate], kl: float
) -> list[str]:
    """Returns the cells of :data:`SEED_HEAD`.

    Args:
        scores: ``(T, P, S)`` in % of ``T`` training seeds; one of an untrained method, which has no cells by seed.
        baseline: ``(P, S)`` of Gaussian noise with the same seeds; ``None`` for no gain.
        estimate: Estimates ``(P, S)`` or ``(T, P, S)`` scores.
        kl: Mean KL to N(0, I) in nats per noise.
    """
    gain = "" if baseline is None else signed(estimate(scores - baseline))
    each = [str(estimate(part)) for part in scores] if len(scores) > 1 else [""] * len(SEEDS)
    return [*each, str(estimate(scores)), gain, seed_spread(scores, estimate), f"{kl:.1f}"]


def seed_spread(scores: np.ndarray, estimate: Callable[[np.ndarray], Estimate]) -> str:
    """Returns the standard deviation of the means of training seeds; nothing for one seed."""
    return f"{np.std([estimate(part).mean for part in scores], ddof=1):.1f}" if len(scores) > 1 else ""


def by_seed(scores: np.ndarray, categories: Sequence[str], prompts: Sequence[str]) -> str:
    """Lists the mean over categories of each training seed; nothing for one seed.

    Args:
        scores: ``(T, P, S)`` in % of ``T`` training seeds.
        categories: Category of each prompt.
        prompts: ``P`` prompts.
    """
    means = [np.mean(list(category_means(part, categories, prompts).values())) for part in scores]
    return ", ".join(f"{mean:.1f}" for mean in means) if len(means) > 1 else ""
