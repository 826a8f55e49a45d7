"""A comparison as tables: filling up on a terminal, and results.csv and results.md.

A row is a dictionary: name, key, label (the method with what was named beside it), recipe (None for the dense model;
in it None for what changes nothing), the MEASURED values (None where a cell failed), error, notes.
"""

from __future__ import annotations

import csv
import io
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

RESULTS = "results.json"
MEASURED = (
    "sparsity",
    "perplexity",
    "seconds",
    "peak_memory_bytes",
    "relative_error",
    "measure_seconds",
    "packed_size",  # share of the dense tensors' bytes; None where the model was measured as it was written
)
AXES = ("method", "score", "group", "update", "allocation", "inherit", "propagate", "variant", "pattern")
_WORD = 28  # the longest word of a table's first column that is not broken on a narrow terminal
_SAMPLING = ("calibration", "samples", "seqlen", "seed")


@dataclass
class Comparison:
    """What a comparison found.

    out: its folder. facts: model, text, windows, seqlen (of both), dtype, threads, versions.
    rows: the dense model's, then one a cell, in the grid's order. notes: sentences for the reader.
    """

    out: Path
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"out": str(self.out), **self.facts, "cells": self.rows, "notes": self.notes}

    def over_seeds(self) -> list[dict[str, Any]]:
        """Mean, standard deviation, least and most of the perplexities of cells that differ in their seed only."""
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            if row["recipe"] is not None and row["perplexity"] is not None:
                groups.setdefault(series_point(row), []).append(row)
        found = []
        for rows in groups.values():
            values = [row["perplexity"] for row in rows]
            if len(values) > 1:
                found.append(
                    {
                        "name": rows[0]["label"],
                        "extent": extent_of(rows[0]),
                        "samples": rows[0]["recipe"]["samples"],
                        "seeds": len(values),
                        "mean": statistics.mean(values),
                        "deviation": statistics.stdev(values),
                        "least": min(values),
                        "most": max(values),
                    }
                )
        return found


def extent_of(row: Mapping[str, Any]) -> str:
    """How much of the model goes, as asked: 2:4, or 50%; "" for the dense model."""
    recipe = row["recipe"]
    return "" if recipe is None else recipe["pattern"] or f"{100 * recipe['sparsity']:g}%"


def series_point(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a cell is but for its seed."""
    return row["label"], extent_of(row), row["recipe"]["samples"]


class Board:
    """The cells with their results so far, on standard error: a table on a terminal, log lines elsewhere."""

    def __init__(self, names: Sequence[str], shown: bool = True):
        self.names, self.shown = names, shown
        self.states = ["waiting"] * len(names)
        self.results: list[tuple[str, str, str]] = [("", "", "")] * len(names)
        self.current = 0
        self.started = time.perf_counter()
        self.console = Console(file=sys.stderr, markup=False)
        self.live: Live | None = None

    def __enter__(self) -> Board:
        if self.shown and self.console.is_terminal:
            self.live = Live(get_renderable=self._table, console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def now(self, number: int, state: str) -> None:
        """Cell `number` is being worked at; state: a line."""
        if state == "pruning" or (state == "measuring" and number != self.current):
            self.started = time.perf_counter()
        self.current, self.states[number] = number, state
        if ":" not in state:
            self._log(number, state)

    def done(self, number: int, row: Mapping[str, Any], again: bool = False) -> None:
        """Cell `number` has its row; again: from an earlier run."""
        self.results[number] = (_perplexity(row), _seconds(row), _memory(row))
        self.states[number] = f"failed: {row['error']}" if row["error"] else "done earlier" if again else "done"
        told = [self.states[number]]
        if not row["error"]:
            told = [f"perplexity {_perplexity(row)}", *filter(None, (_seconds(row, " s"), _memory(row)))]
            told += ["of an earlier run"] if again else []
        self._log(number, ", ".join(told))

    def _log(self, number: int, text: str) -> None:
        if self.shown and self.live is None:
            print(f"{number + 1}/{len(self.names)} {self.names[number]}: {text}", file=sys.stderr, flush=True)

    def _table(self) -> Table:
        """As many rows around the current cell as the terminal has lines."""
        finished = sum(state.startswith(("done", "failed")) for state in self.states)
        table = Table(title=f"{finished} of {len(self.names)} cells", title_justify="left")
        table.add_column("cell", overflow="fold")
        table.add_column("state", overflow="ellipsis", no_wrap=True)
        for name in ("perplexity", "seconds", "memory"):
            table.add_column(name, justify="right", no_wrap=True)
        room = max(3, self.console.height - 8)
        first = max(0, min(self.current - room // 2, len(self.names) - room))
        for number in range(first, min(first + room, len(self.names))):
            perplexity, seconds, memory = self.results[number]
            if number == self.current and not seconds and not self.states[number].startswith(("done", "failed")):
                seconds = f"{time.perf_counter() - self.started:.0f}"
            table.add_row(self.names[number], self.states[number], perplexity, seconds, memory)
        return table


def write_tables(comparison: Comparison) -> None:
    """results.csv (a line a cell, every axis) and results.md (what a reader looks for)."""
    (comparison.out / "results.csv").write_text(_csv(comparison), encoding="utf-8")
    (comparison.out / "results.md").write_text(_markdown(comparison), encoding="utf-8")


def print_comparison(comparison: Comparison) -> None:
    """The tables of results.md, for a terminal."""
    console = Console(markup=False)
    console.print(_headline(comparison), highlight=False)
    header, rows = _cells(comparison)
    _print_table(console, header, rows)
    seeds = _seeds(comparison)
    if seeds[1]:
        console.print("over seeds:")
        _print_table(console, *seeds)
    for note in comparison.notes:
        console.print(f"note: {note}", highlight=False)
    console.print(f"results are in {comparison.out}", highlight=False)


def _print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    words = [word for name in (header[0], *(row[0] for row in rows)) for word in name.split()]
    longest = min(_WORD, max(map(len, words)))  # the first column breaks at blanks
    table = Table()
    for place, name in enumerate(header):
        first = place == 0
        table.add_column(
            name if first else name.replace(" ", "\n"),  # narrow: the first column needs the room
            justify="left" if first else "right",
            overflow="fold",
            min_width=longest if first else 1,
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _headline(comparison: Comparison) -> str:
    facts = comparison.facts
    windows = f"{facts['windows']} window{'s' if facts['windows'] != 1 else ''} of {facts['seqlen']} tokens"
    return f"{facts['model']}: perplexity on {windows} of {facts['text']}, {facts['dtype']}"


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a cell a row; samples and seed only where they differ."""
    recipes = [row["recipe"] for row in comparison.rows if row["recipe"] is not None]
    told = [name for name in ("samples", "seed") if len({r[name] for r in recipes} - {None}) > 1]
    packed = any(row["packed_size"] is not None for row in comparison.rows)
    header = ["method", "sparsity", *told, "perplexity", "output error", "seconds", "peak memory"]
    header += ["packed size"] if packed else []
    rows = []
    for row in comparison.rows:
        recipe = row["recipe"] or {}
        sampling = ["" if recipe.get(name) is None else str(recipe[name]) for name in told]
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.4f}"
        found = "failed" if row["error"] else _perplexity(row)
        values = [row["label"] or "dense", extent_of(row), *sampling, found, error, _seconds(row), _memory(row)]
        size = "" if row["packed_size"] is None else f"{row['packed_size']:.3f}"
        rows.append([*values, size] if packed else values)
    return header, rows


def _seeds(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    rows = comparison.over_seeds()
    samples = ["samples"] if len({row["samples"] for row in rows}) > 1 else []
    header = ["method", "sparsity", *samples, "seeds", "mean perplexity", "standard deviation", "least", "most"]
    return header, [
        [
            row["name"],
            row["extent"],
            *(str(row[name]) for name in samples),
            str(row["seeds"]),
            *(f"{row[name]:.2f}" for name in ("mean", "deviation", "least", "most")),
        ]
        for row in rows
    ]


def _markdown(comparison: Comparison) -> str:
    facts = comparison.facts
    lines = [f"{_headline(comparison)}.", *_calibrations(comparison), ""]
    lines += _markdown_table(*_cells(comparison))
    seeds = _seeds(comparison)
    if seeds[1]:
        lines += ["", "Over seeds (cells that differ in their calibration sample only):", "", *_markdown_table(*seeds)]
    lines += [
        "",
        "Seconds and peak memory are of the pruning process; output error is the mean over the pruned matrices",
    ]
    lines += ["(exact with a Gram matrix, estimated from input norms without one)."]
    if any(row["packed_size"] is not None for row in comparison.rows):
        lines += ["Measured packed (`wanda pack`); packed size is of all tensors, the dense model's being 1."]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    lines += [f"{threads}; {versions}."]
    failed = [f"- {row['name']}: {row['error']}" for row in comparison.rows if row["error"]]
    notes = [f"- {note}" for note in comparison.notes]
    having: dict[str, list[str]] = {}
    for row in comparison.rows:
        for note in row["notes"]:
            having.setdefault(note, []).append(row["name"])
    notes += [f"- {'; '.join(names)}: {note}" for note, names in having.items()]
    for title, items in (("Failed:", failed), ("Notes:", notes)):
        lines += ["", title, "", *items] if items else []
    return "\n".join(lines) + "\n"


def _calibrations(comparison: Comparison) -> list[str]:
    recipes = [row["recipe"] for row in comparison.rows if row["recipe"] is not None]
    calibrated = [recipe for recipe in recipes if recipe["calibration"] is not None]
    if not calibrated:
        return []
    samples = ", ".join(map(str, sorted({recipe["samples"] for recipe in calibrated})))
    first = calibrated[0]
    return [f"Calibration: {samples} sequences of {first['seqlen']} tokens of {first['calibration']}."]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return lines + [f"| {' | '.join(value.replace('|', '/') for value in row)} |" for row in rows]


def _csv(comparison: Comparison) -> str:
    asked = {"asked_sparsity": "sparsity"}
    text = io.StringIO()
    header = ["name", *AXES, *asked, *_SAMPLING, *MEASURED, "windows", "error"]
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    for row in comparison.rows:
        recipe = row["recipe"] or {"method": "dense"}
        values = {name: recipe.get(name) for name in (*AXES, *_SAMPLING)}
        values |= {name: recipe.get(source) for name, source in asked.items()}
        values |= {name: row[name] for name in ("name", *MEASURED, "error")}
        writer.writerow(values | {"seqlen": comparison.facts["seqlen"], "windows": comparison.facts["windows"]})
    return text.getvalue()


def _perplexity(row: Mapping[str, Any]) -> str:
    value = row["perplexity"]
    return "" if value is None else f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def _seconds(row: Mapping[str, Any], unit: str = "") -> str:
    return "" if row["seconds"] is None else f"{row['seconds']:.1f}{unit}"


def _memory(row: Mapping[str, Any]) -> str:
    return "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:,.0f} MB"
