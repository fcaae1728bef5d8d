"""Figure of a comparison: images of the same prompts side by side, and the learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from noisear_rl.evaluation.compare import MethodScores
from noisear_rl.files import atomic
from noisear_rl.learning.records import read_records

RIGHT, WRONG = "#1a9850", "#d73027"


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG atomically and closes the figure."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def learning_curve(axes: plt.Axes, run: Path, key: str = "reward/shapes-match") -> None:
    """Draws the mean of a scorer against training images, with a moving average.

    Args:
        axes: Axes to draw on.
        run: Run folder with ``metrics.jsonl``.
        key: Log key to draw.
    """
    records = [record for record in read_records(run) if key in record]
    images = np.array([record["charts/images"] for record in records])
    values = np.array([record[key] for record in records])
    axes.plot(images, values, color="0.75", linewidth=1)
    window = max(1, len(values) // 10)
    smooth = np.convolve(values, np.ones(window) / window, "valid")
    axes.plot(images[window - 1 :], smooth, color="#2166ac", linewidth=2)
    axes.set_xlabel("training images")
    axes.set_ylabel(key)
    axes.spines[["top", "right"]].set_visible(False)


def comparison(
    path: Path,
    results: Mapping[str, MethodScores],
    prompts: Sequence[str],
    title: str,
    *,
    run: Path | None = None,
    scorer: str = "shapes-exact",
) -> None:
    """Writes a PNG with one row per prompt and one block of images per method, framed green if right and red if wrong.

    Args:
        path: File to write.
        results: Output of :func:`noisear_rl.evaluation.compare.evaluate`, with images.
        prompts: ``P`` prompts.
        title: Title of the figure.
        run: Run folder whose learning curve is added; ``None`` for no curve.
        scorer: The 0/1 score behind the frames.
    """
    methods = list(results)
    shown = next(iter(results.values())).images.shape[1]
    rows = len(prompts)
    height, curve = 1.25 * rows + 0.6, 2.6 if run else 0.01  # inches
    figure = plt.figure(figsize=(2 + 1.1 * shown * len(methods), 0.4 + height + curve), dpi=110)
    top, bottom = figure.subfigures(  # type: ignore[misc]
        2, 1, height_ratios=[height, curve]
    )
    axes = top.subplots(rows, shown * len(methods), squeeze=False)
    top.subplots_adjust(
        left=0.02, right=0.98, top=1 - 0.75 / (1.25 * rows + 0.6), bottom=0.02, hspace=0.35, wspace=0.08
    )
    for m, method in enumerate(methods):
        result = results[method]
        share = 100 * result.scores[scorer].mean()
        middle = (m + 0.5) / len(methods)
        top.text(middle, 1 - 0.45 / height, f"{method}: {share:.0f} % right", ha="center", weight="bold")
        for row in range(rows):
            for column in range(shown):
                cell = axes[row, m * shown + column]
                cell.imshow(result.images[row, column].permute(1, 2, 0).numpy())
                cell.set_xticks([])
                cell.set_yticks([])
                color = RIGHT if result.scores[scorer][row, column] > 0.5 else WRONG
                cell.spines[:].set(color=color, linewidth=2.5)
            axes[row, m * shown].set_title(prompts[row].removeprefix("a photo of "), fontsize=8, loc="left", pad=3)
    figure.suptitle(title, fontsize=11, y=0.995)
    if run is not None:
        axis = bottom.subplots()
        bottom.subplots_adjust(left=0.12, right=0.97, bottom=0.22, top=0.95)
        learning_curve(axis, run)
    save_figure(figure, path)
