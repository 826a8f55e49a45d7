"""A comparison as plots: perplexity against sparsity, seconds and numbers of samples, a line a method."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from wanda.errors import MissingExtraError
from wanda.report.comparison import Comparison, extent_of

_MARKERS = "osD^vPX<>*"
_COLOURS = 10  # of matplotlib's cycle
_LINES = ("-", "--", ":", "-.")


def write_plots(comparison: Comparison) -> list[str]:
    """Write perplexity-sparsity.png, perplexity-seconds.png and, for several sample numbers, perplexity-samples.png.

    Where one sparsity was measured with several numbers of samples, the first is left out.
    Returns notes: why there are no plots, when matplotlib is absent.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return [str(MissingExtraError("drawing plots (the tables are whole without them)", "matplotlib", "plots"))]
    rows = [row for row in comparison.rows if row["recipe"] is not None and row["perplexity"] is not None]
    if not rows:
        return []
    sampled = [row for row in rows if row["recipe"]["samples"] is not None]
    several = len({row["recipe"]["samples"] for row in sampled}) > 1
    if not several or len({extent_of(row) for row in rows}) > 1:
        _plot(comparison, rows, "sparsity", "share of weights removed", lambda row: row["sparsity"])
    _plot(comparison, rows, "seconds", "seconds to prune", lambda row: row["seconds"], line=False)
    if several:
        _plot(comparison, sampled, "samples", "calibration samples", lambda row: row["recipe"]["samples"])
    return []


def _plot(
    comparison: Comparison,
    rows: list[dict[str, Any]],
    name: str,
    axis: str,
    x: Callable[[Mapping[str, Any]], float],
    line: bool = True,
) -> None:
    """A colour a method; unstructured cells joined by a line, each N:M pattern a marker of its own; seeds averaged.

    From the eleventh method on, the colours come again with other markers and lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = list(dict.fromkeys(row["label"] for row in rows))
    patterns = list(dict.fromkeys(row["recipe"]["pattern"] for row in rows))
    kinds = sorted(patterns, key=lambda pattern: pattern is not None)  # unstructured first, as a circle
    for (number, label), (kind, pattern) in itertools.product(enumerate(labels), enumerate(kinds)):
        again, colour = divmod(number, _COLOURS)
        cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            if (row["label"], row["recipe"]["pattern"]) == (label, pattern):
                cells.setdefault((extent_of(row), row["recipe"]["samples"]), []).append(row)
        points = sorted(
            (statistics.mean(map(x, group)), statistics.mean(row["perplexity"] for row in group))
            for group in cells.values()
        )
        if points:
            joined = _LINES[again % len(_LINES)] if line and (pattern is None or name == "samples") else "none"
            axes.plot(
                *zip(*points, strict=True),
                color=f"C{colour}",
                marker=_MARKERS[(kind + again * len(kinds)) % len(_MARKERS)],
                linestyle=joined,
                label=label if pattern is None else f"{label} {pattern}",
            )
    dense = next((row["perplexity"] for row in comparison.rows if row["recipe"] is None), None)
    if dense is not None:
        axes.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
    axes.set_yscale("log")
    scales: list[Any] = [axes.yaxis]
    if name != "sparsity":
        axes.set_xscale("log")
        scales.append(axes.xaxis)
    for scale in scales:
        scale.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        scale.set_minor_formatter(NullFormatter())
    if name == "samples":
        axes.set_xticks(sorted({row["recipe"]["samples"] for row in rows}))
    axes.set_xlabel(axis)
    axes.set_ylabel("perplexity")
    axes.set_title(f"{comparison.facts['model']}, {comparison.facts['text']}", fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(comparison.out / f"perplexity-{name}.png", dpi=110, metadata={"Software": None})
