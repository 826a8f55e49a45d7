"""`wanda prune`: a checkpoint goes in, a sparse checkpoint comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from wanda.recipe import Recipe

_NOTHING = Recipe()


def flags_given(arguments: Sequence[str]) -> set[str]:
    """The fields of Recipe whose flags stand in a command line, at whatever value."""
    flags = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    names = {name: name.replace("_", "-") for name in Recipe.__dataclass_fields__}
    return {name for name, flag in names.items() if flags & {f"--{flag}", f"--no-{flag}"}}


def _end_with_input() -> None:
    """Leave the process when nobody holds its standard input any more: a comparison that was killed.

    Not by sys.stdin, whose lock the interpreter would wait for in vain at its end.
    """
    import contextlib
    import os

    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os._exit(1)


def prune_command(
    model: str,
    *,
    out: Path,
    options: Recipe = _NOTHING,
    recipe: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    resume: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    shared: Annotated[Path | None, Parameter(show=False)] = None,
) -> None:
    """Prune a model without retraining.

    Parameters
    ----------
    model
        A Hugging Face folder, a hub id, or a .gguf file (dequantised first).
    out
        Folder to write; it is whole or absent.
    recipe
        Repeat the run of an earlier wanda.json; flags given beside it override its fields.
    dry_run
        Print the plan (layers, time, memory, disk) and stop; loads no weights.
    overwrite
        Replace a non-empty --out.
    resume
        Go on with a run that was killed, ending in the same bytes.
    json
        End with one JSON object on standard output.
    shared
        A folder in which runs on this very model keep what the next ones need too. `wanda compare` gives it, and holds
        standard input open for as long as it lives: when that ends, the run does.
    """
    import json as json_module
    import sys
    import threading

    from wanda.parallel import Ranks
    from wanda.pipeline import prune
    from wanda.plan import Plan
    from wanda.report.card import command_line
    from wanda.report.tables import print_plan, print_report

    if recipe is not None:
        options = options.over(Recipe.from_file(recipe), flags_given(sys.argv[1:]))
    if shared is not None:
        threading.Thread(target=_end_with_input, daemon=True).start()
    # A comparison's recipe is in a file that will be gone, so its models name the one beside them.
    again = sys.argv[1:] if shared is None else ["prune", model, "--recipe", "wanda.json", "--out", "DIR"]
    with Ranks.started() as ranks:
        result = prune(
            model,
            out=out,
            recipe=options,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
            command=command_line(again),
            ranks=ranks,
            shared=shared,
        )
    if not ranks.leads:
        return
    if json:
        print(json_module.dumps(result.as_dict()))
    elif isinstance(result, Plan):
        print_plan(result)
    else:
        print_report(result)
