"""Tables as people see them: whole at 80 columns, and names as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models import tiny_llama
from wanda import prune
from wanda.inspection import inspect
from wanda.plan import Plan
from wanda.report.tables import print_inspection, print_plan, print_report

OPTIONS: dict[str, Any] = {"calibration": "builtin", "samples": 2, "seqlen": 16, "progress": False}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder whose name a markup language would take for a closing tag and a colour."""
    return tiny_llama(tmp_path_factory.mktemp("t") / "a[/b]" / "m[red]")


@pytest.mark.parametrize(
    "options", [{"variant": True}, {"method": "sparsegpt"}, {"group": "block:16"}, {"pattern": "2:4"}]
)
def test_the_plan_is_whole_at_80_columns(
    odd: Path,
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plan = prune(odd, out=tmp_path / "o[/i]", dry_run=True, **OPTIONS | options)
    assert isinstance(plan, Plan)
    print_plan(plan)
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines() if "->" not in line)
    head = next(line for line in text.splitlines() if "matrix" in line)
    assert head.split() == ["matrix", "count", "shape", "pattern", "sparsity"]
    assert text.count("0.5000") == 7 and "m[red]" in "".join(text.split()) and "o[/i]" in "".join(text.split())


def test_reports_and_inspections_are_whole_at_80_columns(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    report: Any = prune(odd, out=tmp_path / "o[/i]", method="magnitude", **OPTIONS)
    print_report(report)
    print_inspection(inspect(tmp_path / "o[/i]"))
    text = capsys.readouterr().out
    assert text.count("o[/i]") >= 2 and text.count(" 0, 0") == 28 and "columns" in text
