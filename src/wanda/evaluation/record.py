"""Results of evaluations, kept with the checkpoint that they are of: in wanda.json and on the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanda.checkpoint.folder import replace_file
from wanda.errors import RunError

_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def record(folder: Path, kind: str, results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Merge results into `folder`/wanda.json under evaluation/kind and onto README.md; False when there is no report.

    results: by what was measured (a text and its seqlen, a task); a later result of the same takes the earlier one's
    place, others stay. Both files are replaced whole or not at all. Raises RunError when they cannot be written.
    """
    file = folder / "wanda.json"
    if not file.is_file():
        return False
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        evaluation = report.setdefault("evaluation", {})
        evaluation.setdefault(kind, {}).update(results)
        replace_file(file, json.dumps(report, indent=1) + "\n")
        card = folder / "README.md"
        if card.is_file():
            replace_file(card, _with_section(card.read_text(encoding="utf-8"), evaluation))
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"the result cannot be kept in {file} ({error}); it is printed only") from error
    return True


def _with_section(card: str, evaluation: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The card with its section of results written anew."""
    rows = []
    for kind, results in evaluation.items():
        for name, values in results.items():
            shown = ", ".join(f"{key} {_short(value)}" for key, value in values.items() if value is not None)
            rows.append(f"| {kind} | {name} | {shown} |")
    section = "\n".join([_BEGIN, "## Evaluation", "", "| kind | of | result |", "|---|---|---|", *rows, _END])
    before, found, rest = card.partition(_BEGIN)
    after = rest.partition(_END)[2] if found else "\n"
    return (before if found else card.rstrip("\n") + "\n\n") + section + after


def without_evaluation(card: str) -> str:
    """The card without its section of results, for weights that are no longer the measured ones."""
    before, found, rest = card.partition(_BEGIN)
    return before + rest.partition(_END)[2].lstrip("\n") if found else card


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
