"""`wanda compare`: a grid of ways to prune, each pruned and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from wanda.evaluation.grid import Grid, Setting

_GRID, _SETTING = Grid(), Setting()


def compare_command(
    model: str,
    *,
    out: Path,
    grid: Grid = _GRID,
    setting: Setting = _SETTING,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Prune a model in every way of a grid and measure each; the same command goes on with what was stopped.

    Parameters
    ----------
    model
        A Hugging Face folder, a hub id, or a .gguf file (dequantised first).
    out
        Folder of the results: results.json, results.csv, results.md and plots. Cells it has are not run again.
    json
        End with one JSON object on standard output instead of the table.
    """
    import json as json_module

    from wanda.evaluation.compare import compare
    from wanda.report.comparison import print_comparison

    result = compare(model, out=out, grids=[grid], setting=setting)
    if json:
        print(json_module.dumps(result.as_dict()))
    else:
        print_comparison(result)
