"""The command line: which commands there are. Each lives in wanda/commands and is imported when it is called."""

from __future__ import annotations

import os
import sys

from cyclopts import App

from wanda.errors import WandaError

app = App(
    name="wanda",
    help="Makes pretrained models smaller and faster without retraining.",
    version_flags=["--version"],
)
for _name in ("prune", "eval", "inspect", "methods", "demo"):
    app.command(f"wanda.commands.{_name}:{_name}_command", name=_name)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors a user can mend are one message, exit code 2 (asked wrongly) or 1 (on the way)."""
    try:
        app(arguments)
    except WandaError as error:
        print(f"wanda: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("wanda: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
