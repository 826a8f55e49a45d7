"""Seconds of pruning by Wanda against the number of blocks, of calibration tokens, and the hidden width squared.

    python bench/scaling.py [--rounds 3] [--only blocks|samples|hidden_size] [--out bench/results/scaling.json]

Every point is the whole call of wanda.prune on a LLaMA shape of random weights: reading, pruning, writing. In each
round all points are measured once, in an order of its own. A line is fitted to the medians by least squares; its R^2,
its intercept (what a run costs whatever its size) and the largest deviation are given. A plot lies beside the result.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from facts import facts, save, spread
from options import positive
from shapes import make_llama, write_text
from wanda.pipeline import prune


@dataclass(frozen=True)
class Point:
    """A model and a number of samples; x: its place on the axis."""

    axis: str
    x: int
    model: Path
    samples: int


def points(folder: Path, config: dict[str, Any], axes: Sequence[str]) -> list[Point]:
    """All points of the axes, each model made once."""
    made: dict[tuple[int, int], Path] = {}

    def model(blocks: int, width: int) -> Path:
        if (blocks, width) not in made:
            shape = config["shape"] | {"num_hidden_layers": blocks, "hidden_size": width}
            shape |= {"intermediate_size": width * 11 // 4, "num_attention_heads": width // 64}
            made[blocks, width] = make_llama(folder / f"{blocks}-{width}", shape)
        return made[blocks, width]

    samples, seqlen = config["samples"], config["seqlen"]
    blocks, width = config["shape"]["num_hidden_layers"], config["shape"]["hidden_size"]
    place: dict[str, Callable[[int], Point]] = {
        "blocks": lambda n: Point("blocks", n, model(n, width), samples),
        "samples": lambda n: Point("samples", n * seqlen, model(blocks, width), n),
        "hidden_size": lambda n: Point("hidden_size", n**2, model(blocks, n), samples),
    }
    return [place[axis](value) for axis in axes for value in config["axes"][axis]]


def seconds(point: Point, text: str, config: dict[str, Any], out: Path) -> float:
    options = {name: config[name] for name in ("seqlen", "dtype", "propagate")}
    start = time.perf_counter()
    prune(point.model, out=out, calibration=text, samples=point.samples, progress=False, **options)
    taken = time.perf_counter() - start
    shutil.rmtree(out)
    return taken


def fit(x: Sequence[int], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line through the points."""
    slope, intercept = statistics.linear_regression(x, y)
    mean = statistics.mean(y)
    rest = [value - intercept - slope * at for at, value in zip(x, y, strict=True)]
    return {
        "slope": slope,
        "intercept": intercept,
        "r_squared": 1 - sum(r**2 for r in rest) / sum((value - mean) ** 2 for value in y),
        "largest_deviation": max(abs(r) / value for r, value in zip(rest, y, strict=True)),
    }


def draw(file: Path, axes: dict[str, Any]) -> None:
    """A panel an axis: medians with their range, and the fitted line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = {"blocks": "blocks", "samples": "calibration tokens", "hidden_size": "hidden width squared"}
    figure = Figure(figsize=(4 * len(axes), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (axis, found) in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True):
        x, rows = found["x"], found["seconds"]
        line = found["fit"]
        middle = [row["median"] for row in rows]
        below = [row["median"] - row["min"] for row in rows]
        above = [row["max"] - row["median"] for row in rows]
        panel.errorbar(x, middle, yerr=[below, above], fmt="o", capsize=3)
        ends = [0, max(x)]
        panel.plot(ends, [line["intercept"] + line["slope"] * end for end in ends], "--")
        top = 1.1 * max(row["max"] for row in rows)
        panel.set(xlabel=labels[axis], ylabel="seconds", ylim=(0, top), title=f"R² = {line['r_squared']:.4f}")
        panel.ticklabel_format(axis="x", scilimits=(0, 4))
        panel.grid(alpha=0.25)
    figure.savefig(file, dpi=90, metadata={"Software": None})


def main() -> None:
    here = Path(__file__)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=here.with_suffix(".toml"))
    parser.add_argument("--rounds", type=positive, help="instead of the config's number")
    parser.add_argument("--samples", type=positive, help="at the points of the other axes, instead of the config's")
    parser.add_argument("--only", choices=("blocks", "samples", "hidden_size"), help="one axis")
    parser.add_argument("--threads", type=positive, help="of torch; its own choice when nothing is said")
    parser.add_argument("--out", type=Path, default=here.parent / "results" / "scaling.json")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; the system's temporary folder")
    arguments = parser.parse_args()
    if arguments.samples is not None and arguments.only == "samples":
        parser.error("--samples is of the other axes, which --only samples leaves out; give one of the two")
    config = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    config |= {n: v for n in ("rounds", "samples") if (v := getattr(arguments, n)) is not None}
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {**facts(), "config": config}
    axes = [arguments.only] if arguments.only else list(config["axes"])
    shuffled = random.Random(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        print("making the checkpoints", flush=True)
        measured = points(folder, config, axes)
        text = write_text(folder / "text.txt", max(point.samples for point in measured) * config["seqlen"])
        taken: dict[Point, list[float]] = {point: [] for point in measured}
        seconds(measured[0], text, config, folder / "out")  # what the first call alone costs is no part of a line
        for number in range(config["rounds"]):
            for point in shuffled.sample(measured, len(measured)):
                taken[point].append(seconds(point, text, config, folder / "out"))
                print(f"round {number + 1}, {point.axis} {point.x}: {taken[point][-1]:.2f} s", flush=True)
    result["axes"] = {}
    for axis in axes:
        here_points = [point for point in measured if point.axis == axis]
        x = [point.x for point in here_points]
        line = fit(x, [statistics.median(taken[point]) for point in here_points])
        result["axes"][axis] = {"x": x, "seconds": [spread(taken[point]) for point in here_points], "fit": line}
        print(f"{axis}: R^2 {line['r_squared']:.4f}, largest deviation {line['largest_deviation']:.1%}")
    save(arguments.out, result)
    draw(arguments.out.with_suffix(".png"), result["axes"])


if __name__ == "__main__":
    main()
