"""`wanda demo`: what pruning does to a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def demo_command(
    *,
    out: Path | None = None,
    model_only: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Prune SmolLM2-135M-Instruct to 50% by magnitude and by Wanda, and compare them with the dense model.

    Parameters
    ----------
    out
        Folder for the two pruned models; a folder in the cache when nothing is said.
    model_only
        Only fetch the model and print its folder.
    json
        End with one JSON object on standard output instead of the table.
    """
    import json as json_module
    import sys

    from wanda import demo
    from wanda.checkpoint.source import cache_folder

    if model_only:
        print(demo.model_folder())
        return
    folder = out or cache_folder() / "demo"
    rows = demo.run(folder, lambda line: print(line, file=sys.stderr, flush=True))
    if json:
        print(json_module.dumps({"folder": str(folder), "rows": [vars(row) for row in rows]}))
    else:
        demo.show(rows)
        print(f"\nThe pruned models are in {folder}")
