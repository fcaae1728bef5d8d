"""Charts of the report page: inline SVG in the colours of the page, and maps of the noise.

A chart is 360 units wide, roughly its width on a phone and in a column, so the text keeps its size. Colours come from
``--s0`` … ``--s6`` of the style sheet, so charts follow light mode, dark mode and print.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from noisear_rl.evaluation.results import Results
from noisear_rl.evaluation.tables import scorers
from noisear_rl.report.embed import SMALL, EmbeddedImage, embed_image
from noisear_rl.report.summary import plain

WIDTH, HEIGHT = 360, 210
COLORS = 7
LETTERS = 17  # of a method's name next to a chart
POINTS = 200  # per curve
LONG = 30  # curves with at least this many records are smoothed
# Log keys that show whether a run learns. The first one in a run's log is drawn, and below it the drift.
OBJECTIVES = {
    "charts/episodic_return": "Mean reward",
    "eval/rewards/accuracies": "Accuracy on pairs of held-out prompts",
    "losses/nll_held_out": "Held-out negative log-likelihood, nats per element",
    "losses/nll": "Negative log-likelihood, nats per element",
    "eval/loss": "Held-out loss",
    "loss": "Loss",
}
DRIFT = {"policy/kl_to_gaussian": "KL to N(0, I), nats per noise"}
NEGATIVE, POSITIVE = np.array([33, 102, 172]), np.array([178, 24, 43])


@dataclass(frozen=True)
class Line:
    """One curve: points ``x`` and ``y``, both ``(n,)``, the index of its colour, and the label at its end."""

    x: np.ndarray
    y: np.ndarray
    color: int | None = None
    label: str = ""
    faint: bool = False


def color(index: int | None) -> str:
    """Returns the style of a series: grey for 0 (the baseline), then a cycle of six; the text colour for ``None``."""
    if index is None:
        return "--c:var(--ink)"
    return f"--c:var(--s{0 if index == 0 else 1 + (index - 1) % (COLORS - 1)})"


def short(value: float) -> str:
    """Formats a number for an axis: ``0.25``, ``12``, ``150k``, ``1.5M``, with a true minus sign."""
    for least, unit, letter in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return short(value / unit) + letter
    return f"{value:.4g}".replace("-", "−")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns at most ``count + 2`` round numbers from ``low`` to ``high``."""
    raw = max(high - low, 1e-12) / (count + 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def spread_labels(wanted: Sequence[float], gap: float) -> list[float]:
    """Spreads positions to a distance of at least ``gap``, keeping their order and mean."""
    order, placed = np.argsort(wanted, kind="stable"), np.array(wanted, dtype=float)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    return (placed - np.sum(placed - wanted) / max(len(placed), 1)).tolist()


def _side_labels(names: Sequence[str]) -> tuple[list[str], float]:
    """Returns the names shortened to fit next to a chart, and the width they take."""
    cut = [name if len(name) <= LETTERS else name[: LETTERS - 1] + "…" for name in names]
    return cut, 14 + 6.8 * max(map(len, cut), default=0)


def _svg(height: float, description: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">')
    return head.format(WIDTH, height, description) + Markup("").join(parts) + Markup("</svg>")


def _text(x: float, y: float, text: str, kind: str, style: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" style="{}">{}</text>').format(x, y, kind, style, text)


def _rule(x: float, y: float, to_x: float, to_y: float, kind: str) -> Markup:
    template = Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>')
    return template.format(x, y, to_x, to_y, kind)


def line_chart(
    lines: Sequence[Line],
    description: str,
    x_label: str,
    *,
    reference: tuple[float, str] | None = None,
    logarithmic: bool = False,
) -> Markup:
    """Draws curves with labels at their ends.

    Args:
        lines: At least one curve, with finite values, positive if ``logarithmic``.
        description: Text alternative for screen readers.
        x_label: Name and unit of ``x``.
        reference: Value and label of a dashed horizontal line.
        logarithmic: Whether the vertical axis is logarithmic, in octaves.

    Returns:
        An ``svg`` element.
    """
    tagged = [(line.label, float(line.y[-1]), color(line.color)) for line in lines if line.label]
    tagged += [(reference[1], reference[0], "--c:var(--ink)")] if reference else []
    names, room = _side_labels([label for label, _, _ in tagged])
    left, right, top, bottom = 40, WIDTH - room, 10, HEIGHT - 36
    scale = np.log2 if logarithmic else np.asarray
    values = np.concatenate([scale(line.y) for line in lines] + ([scale([reference[0]])] if reference else []))
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin
    start, end = min(float(line.x[0]) for line in lines), max(float(line.x[-1]) for line in lines)
    across: Callable[..., Any] = lambda x: left + (right - left) * (np.asarray(x) - start) / ((end - start) or 1)
    down: Callable[..., Any] = lambda y: bottom - (bottom - top) * (scale(y) - low) / (high - low)

    parts = []
    for tick in ticks(low, high):
        if logarithmic and tick % 1:
            continue
        value = 2.0**tick if logarithmic else tick
        parts += [
            _rule(left, down(value), right, down(value), "grid"),
            _text(left - 6, down(value) + 4, short(value), "end"),
        ]
    parts += [_text(across(tick), bottom + 16, short(tick), "middle") for tick in ticks(start, end)]
    parts.append(_text((left + right) / 2, HEIGHT - 4, x_label, "middle name"))
    if reference is not None:
        parts.append(_rule(left, down(reference[0]), right, down(reference[0]), "reference"))
    for line in lines:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across(line.x), down(line.y), strict=True))
        kind = "line faint" if line.faint else "line"
        parts.append(Markup('<polyline points="{}" class="{}" style="{}"/>').format(points, kind, color(line.color)))
    places = spread_labels([float(down(value)) for _, value, _ in tagged], 14)
    for name, y, (_, _, style) in zip(names, places, tagged, strict=True):
        parts.append(_text(right + 6, y + 4, name, "start tag", style))
    return _svg(HEIGHT, description, parts)


def ridges(rows: Sequence[tuple[str, int, np.ndarray]], description: str, *, percent: bool = False) -> Markup:
    """Draws stacked histograms, one row per method, each with its mean as a line and a number.

    Args:
        rows: Name, colour index and values ``(n,)`` of each row.
        description: Text alternative for screen readers.
        percent: Whether values are shares in [0, 1], printed in percent.

    Returns:
        An ``svg`` element.
    """
    names, left = _side_labels([name for name, _, _ in rows])
    right, step, tall = WIDTH - 52, 46, 38
    every = np.concatenate([values for _, _, values in rows])
    low, high = (0.0, 1.0) if percent else (float(every.min()), float(every.max()))
    high = high if high > low else low + 1
    across = lambda x: left + (right - left) * (x - low) / (high - low)
    edges = np.linspace(low, high, 21)
    shares = [np.histogram(values, edges)[0] / len(values) for _, _, values in rows]
    peak, bottom = max(float(share.max()) for share in shares), 8 + step * len(rows)
    digits = int(np.clip(2 - math.floor(math.log10(high - low)), 0, 4))
    parts = []
    for tick in ticks(low, high, 2):
        parts.append(_rule(across(tick), 8, across(tick), bottom, "grid"))
        parts.append(_text(across(tick), bottom + 16, f"{100 * tick:.0f} %" if percent else short(tick), "middle"))
    for i, (name, (_, index, values), share) in enumerate(zip(names, rows, shares, strict=True)):
        base = 8 + step * (i + 1)
        path = f"M{left:.1f} {base}" + "".join(
            f"V{base - tall * part / peak:.1f}H{across(edge):.1f}" for part, edge in zip(share, edges[1:], strict=True)
        )
        mean = float(np.mean(values))
        shown = f"{100 * mean:.0f} %" if percent else plain(mean, digits)
        parts.append(Markup('<path d="{}V{}Z" class="ridge" style="{}"/>').format(path, base, color(index)))
        parts.append(_rule(left, base, right, base, "axis"))
        mark = Markup('<line x1="{0:.1f}" y1="{1}" x2="{0:.1f}" y2="{2}" class="mean" style="{3}"/>')
        parts.append(mark.format(across(mean), base - tall, base, color(index)))
        parts += [_text(left - 8, base - 4, name, "end tag", color(index)), _text(WIDTH - 2, base - 4, shown, "end")]
    return _svg(bottom + 22, description, parts)


def interval_mark(mean: float, low: float, high: float, limits: tuple[float, float], strong: bool) -> Markup:
    """Draws an interval on the scale ``limits`` with a line at 0; ``strong`` if the interval excludes 0."""
    across = lambda x: 2 + 96 * (x - limits[0]) / ((limits[1] - limits[0]) or 1)
    template = Markup(
        '<svg class="interval{}" viewBox="0 0 100 14" aria-hidden="true"><line x1="{z:.1f}" x2="{z:.1f}" y1="0" '
        'y2="14" class="zero"/><line x1="{:.1f}" x2="{:.1f}" y1="7" y2="7"/><circle cx="{:.1f}" cy="7" r="3.2"/></svg>'
    )
    return template.format(" strong" if strong else "", across(low), across(high), across(mean), z=across(0))


def noise_map(values: np.ndarray, limit: float) -> EmbeddedImage:
    """Draws a map ``(h, w)`` in diverging colours: white at 0, blue at ``-limit``, red at ``limit``."""
    share = np.clip(values / (limit or 1), -1, 1)[..., None]
    pixels = 255 + np.abs(share) * (np.where(share < 0, NEGATIVE, POSITIVE) - 255)
    image = Image.fromarray(pixels.round().astype(np.uint8))
    image.thumbnail((SMALL, SMALL))
    return embed_image(image, "PNG", optimize=True)


def _curve(log: Sequence[dict[str, Any]], key: str) -> tuple[str, np.ndarray, np.ndarray]:
    """Returns the finite values of a log key, and the key and values of the horizontal axis."""
    finite = lambda value: isinstance(value, (int, float)) and math.isfinite(value)
    records = [record for record in log if finite(record.get(key))]
    x_key = "charts/images" if all("charts/images" in record for record in records) else "step"
    x, y = (np.array([record[name] for record in records], dtype=float) for name in (x_key, key))
    return x_key, x, y


def learning_chart(
    logs: Sequence[Sequence[dict[str, Any]]], key: str, description: str, color: int | None
) -> Markup | None:
    """Draws a log key over training: one faint line per run and its moving average; ``None`` without finite values."""
    curves = [curve for curve in (_curve(log, key) for log in logs) if len(curve[1])]
    lines = []
    for _, x, y in curves:
        keep = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
        if len(y) >= LONG:
            lines.append(Line(x[keep], y[keep], color, faint=True))
            window = np.ones(len(y) // 10)
            y = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
        lines.append(Line(x[keep], y[keep], color))
    x_label = {"charts/images": "training images", "step": "updates"}
    return line_chart(lines, description, x_label[curves[0][0]]) if curves else None


def learning_panels(
    titles: Mapping[str, Sequence[Sequence[dict[str, Any]]]], groups: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the panels of the learning curves: objective and drift from N(0, I) for each title.

    The logs of one title are the training seeds of one method. A title that names a group of the evaluation takes its
    colour.
    """
    panels, colors = [], {group.lower(): index for index, group in enumerate(groups)}
    for title, logs in titles.items():
        color = colors.get(title.lower())
        charts = []
        for keys in (OBJECTIVES, DRIFT):
            key = next((key for key in keys if any(key in record for log in logs for record in log)), None)
            chart = learning_chart(logs, key, f"{keys[key]}, {title}", color) if key else None
            charts += [{"title": keys[key], "chart": chart}] if key and chart else []
        note = f"{len(logs)} training seeds" if len(logs) > 1 else "one training run"
        panels.append(
            {
                "title": title,
                "color": color,
                "note": note + ("" if charts else ": nothing to draw in its log"),
                "charts": charts,
            }
        )
    return panels


def score_panels(results: Results, *, binary: bool) -> list[dict[str, Any]]:
    """Returns one panel per scorer: the distribution of its scores by group, or of means per prompt for a 0/1 judge."""
    panels = []
    for scorer in scorers(results):
        shares, rows = binary and scorer == results.judge, []
        for index, (group, members) in enumerate(results.groups.items()):
            scores = np.stack([results.methods[name].scores[scorer] for name in members])  # (seeds, P, S)
            rows.append((group, index, scores.mean((0, 2)) if shares else scores.ravel()))
        title = f"{scorer}, share right by prompt" if shares else f"{scorer}, by image"
        panels.append({"title": title, "chart": ridges(rows, f"Distribution of {title}, by method", percent=shares)})
    return panels


def noise_panels(results: Results) -> dict[str, Any]:
    """Returns mean maps by method on one colour scale and radial spectra by group in one chart, if measured."""
    every = [method.noise_map for method in results.methods.values() if method.noise_map.size]
    limit = max((float(np.abs(values).max()) for values in every), default=0.0)
    maps, lines = [], []
    for index, (group, members) in enumerate(results.groups.items()):
        methods = {name: results.methods[name] for name in members}
        tiles = [
            (name, noise_map(method.noise_map, limit)) for name, method in methods.items() if method.noise_map.size
        ]
        maps += [(group, index, tiles)] if tiles else []
        powers = [method.radial_spectrum for method in methods.values() if method.radial_spectrum.size]
        if powers:
            power = np.maximum(np.mean(powers, axis=0), 1e-6)
            lines.append(Line(np.arange(len(power)), power, index, group))
    spectrum = None
    if lines:
        powers = [value for line in lines for value in line.y]
        spectrum = line_chart(
            lines,
            "Power of the noise by radial frequency, by method; N(0, I) has 1 everywhere",
            "radial frequency, low to high",
            reference=(1.0, "N(0, I)"),
            logarithmic=bool(max(powers) > 4 * min(powers)),
        )
    return {"limit": short(float(f"{limit:.2g}")), "maps": maps, "spectrum": spectrum}
