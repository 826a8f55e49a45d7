"""Tables that fit a terminal: the plan, the summary of a run, an inspection."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from wanda.report import Report

if TYPE_CHECKING:
    from wanda.inspection import Inspection
    from wanda.plan import Plan


_NAME = 20  # the narrowest that a column of names gets; they fold


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def kind(name: str) -> str:
    """The name of a matrix with its block's and expert's numbers left out."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def print_plan(plan: Plan) -> None:
    """The plan of a dry run: a row per kind of matrix, then time, memory and disk."""
    console = Console(markup=False)
    table = Table(title=f"plan: {plan.model} -> {plan.out}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("matrix", overflow="fold", min_width=_NAME)
    for column in ("count", "shape", "pattern", "sparsity"):
        if column == "pattern":
            table.add_column(column, max_width=18)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    rows: dict[tuple[str, str, str, str], int] = {}
    for block in plan.matrices:
        for m in block:
            pattern = plan.pattern(m)
            key = (
                kind(m.name),
                f"{m.out} x {m.width}",
                pattern.text,
                f"{pattern.removed(m.out, m.width) / m.numel:.4f}",
            )
            rows[key] = rows.get(key, 0) + 1
    for (name, shape, text, sparsity), count in rows.items():
        table.add_row(name, str(count), shape, text, sparsity)
    console.print(table)
    _print_totals(console, plan)
    _print_notes(console, plan.notes, plan.dense)


def print_start(plan: Plan) -> None:
    """The plan in a few lines on standard error, before a run that memory has a say in."""
    console = Console(file=sys.stderr, markup=False)
    _print_totals(console, plan)
    _print_notes(console, plan.notes, {})


def _print_totals(console: Console, plan: Plan) -> None:
    recipe = plan.recipe
    console.print(f"{plan.removed():,} of {plan.weights():,} weights go; {len(plan.dense)} other parameters stay dense")
    console.print(
        f"method {recipe.method}: score {recipe.score}, update {recipe.update}, allocation {recipe.allocation}"
    )
    if plan.calibrated:
        each = f"{plan.seqlen} tokens" if plan.image is None else f"({' x '.join(map(str, plan.image))}) images"
        console.print(
            f"calibration {recipe.calibration}: {recipe.samples} x {each}, {min(plan.batch, recipe.samples)} at a time,"
            f" propagate {recipe.propagate}"
        )
    device = f", {size(plan.device_memory)} on {plan.skeleton.device}" if plan.device_memory else ""
    console.print(
        f"about {duration(plan.seconds())}, {size(plan.memory)} of memory{device},"
        f" {size(plan.checkpoint.nbytes)} on disk"
    )


def print_report(report: Report) -> None:
    """The summary of a finished run."""
    console = Console(markup=False)
    errors = [row["relative_error"] for row in report.layers if row["relative_error"] is not None]
    console.print(f"{report.out}: {report.sparsity:.2%} of {report.weights:,} weights removed", highlight=False)
    parts = [duration(report.seconds), f"peak memory {size(report.peak_memory_bytes)}"]
    if errors:
        parts.append(f"mean relative output error {sum(errors) / len(errors):.4f}")
    console.print(", ".join(parts), highlight=False)
    _print_notes(console, report.all_notes(), report.left_dense)


def print_inspection(inspection: Inspection) -> None:
    """A row per matrix (per kind and equal figures), then sizes."""
    console = Console(markup=False)
    table = Table(title=inspection.model, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("matrix", overflow="fold", min_width=_NAME)
    for column in ("shape", "sparsity", "obeys", "dead rows,\ncolumns"):
        table.add_column(column, justify="right", no_wrap=column != "obeys")
    for m in inspection.matrices:
        dead = f"{m.dead_rows}, {m.dead_columns}"
        table.add_row(m.name, f"{m.shape[0]} x {m.shape[1]}", f"{m.sparsity:.4f}", " ".join(m.patterns) or "-", dead)
    console.print(table)
    console.print(
        f"{inspection.sparsity:.2%} of the blocks' matrices and {inspection.zeros / max(1, inspection.weights):.2%} of "
        f"all {inspection.weights:,} weights are zero; {size(inspection.file_bytes)} on disk"
    )


def _print_notes(console: Console, notes: list[str], dense: dict[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in dense.items():
        by_reason.setdefault(reason, []).append(kind(name))
    for reason, names in by_reason.items():
        kinds = sorted(set(names))
        shown = ", ".join(kinds[:6]) + (f" and {len(kinds) - 6} more kinds" if len(kinds) > 6 else "")
        console.print(f"left dense, {reason}: {shown} ({len(names)} parameters)", highlight=False)
    for note in notes[:12]:
        console.print(f"note: {note}", highlight=False)
    if len(notes) > 12:
        console.print(f"and {len(notes) - 12} more notes in wanda.json", highlight=False)
