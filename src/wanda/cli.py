"""The command line: which commands there are. Each lives in wanda/commands and is imported when it is called."""

from __future__ import annotations

import os
import sys

from cyclopts import App

from wanda.errors import WandaError
from wanda.memory import reuse_memory

app = App(
    name="wanda",
    help="Makes pretrained models smaller and faster without retraining.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # main says how to go on
)
COMMANDS = {
    "demo": "Prune a small real model and show what that does to it.",
    "prune": "Prune a model without retraining.",
    "compare": "Prune in every way of a grid and measure each.",
    "eval": "Measure models: perplexity and tasks.",
    "tune": "Train a pruned model on; what was removed stays zero.",
    "merge": "Merge a LoRA adapter into its pruned model, under the masks.",
    "pack": "Make a sparse checkpoint as small as it is sparse, without loss.",
    "unpack": "Write a packed checkpoint as an ordinary one again.",
    "run": "Generate text with a packed checkpoint.",
    "bench": "Time a packed model against a dense one.",
    "inspect": "Show the sparsity of every layer, N:M patterns and sizes.",
    "methods": "List the methods, scores, updates and allocations.",
}
for _name, _help in COMMANDS.items():
    app.command(f"wanda.commands.{_name}:{_name}_command", name=_name, help=_help)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors a user can mend are one message, exit code 2 (asked wrongly) or 1 (on the way)."""
    reuse_memory()
    try:
        app(arguments)
    except WandaError as error:
        print(f"wanda: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as stop:
        print(f"wanda: stopped{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
