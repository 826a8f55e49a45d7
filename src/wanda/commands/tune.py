"""`wanda tune`: train a pruned checkpoint on, its zeros held."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from wanda.recovery.settings import Settings

_DEFAULTS = Settings()


def tune_command(
    folder: Path,
    *,
    out: Path,
    settings: Settings = _DEFAULTS,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    resume: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a pruned model on (--lora or --full); what was removed stays zero.

    Several GPUs: start it with `accelerate launch -m wanda tune ...`.

    Parameters
    ----------
    folder
        A pruned checkpoint.
    out
        Folder to write; it is whole or absent. An adapter with --lora, a checkpoint with --full.
    overwrite
        Replace a non-empty --out.
    resume
        Go on with a run that was stopped, from its last checkpoint.
    json
        End with one JSON object on standard output.
    """
    import json as json_module
    import shlex
    import sys

    from wanda.recovery.tune import tune

    command = shlex.join(["wanda", *sys.argv[1:]])
    record = tune(folder, out=out, settings=settings, overwrite=overwrite, resume=resume, command=command)
    if not record:  # a helper process of several
        return
    if json:
        print(json_module.dumps(record))
        return
    loss = record["held_out_loss"]
    print(
        f"{out}: held-out loss {loss['before']:.4f} before, {loss['best']:.4f} at step {loss['best_step']} of "
        f"{record['steps']} ({record['stopped']}, {record['seconds']:.0f} s)\n"
        f"{record['zeros']:,} of {record['pruned_matrices_weights']:,} weights of the pruned matrices are zero, as "
        "before"
    )
    for note in record["notes"]:
        print(f"note: {note}")
    if record["kind"] == "lora":
        print(f"merge it under the masks with: wanda merge {folder} {out} --out DIR")
