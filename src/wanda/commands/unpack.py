"""`wanda unpack`: a packed checkpoint back into an ordinary one, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

_EVERY = 50  # tensors between two log lines


@contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """A function to call with each tensor's name: a spinner with it on a terminal, a line now and then elsewhere."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    count = 0
    if console.is_terminal:
        with console.status(what) as status:

            def show(name: str) -> None:
                nonlocal count
                count += 1
                status.update(f"{what} {count}: {name}")

            yield show
    else:

        def log(name: str) -> None:
            nonlocal count
            count += 1
            if count % _EVERY == 0:
                print(f"{what}: {count} tensors, {name}", file=sys.stderr, flush=True)

        yield log


def unpack_command(packed: Path, *, out: Path, overwrite: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Write a packed checkpoint as an ordinary one that every program reads.

    Parameters
    ----------
    packed
        Folder that `wanda pack` wrote.
    out
        Folder to write.
    overwrite
        Replace an --out that is not empty.
    """
    from wanda.checkpoint.packed import unpack

    with progress("unpacking") as step:
        total, left_out = unpack(packed, out, overwrite, step)
    for name in left_out:
        print(f"wanda: {name} was not taken over", file=sys.stderr)
    print(f"{total / 1e6:.1f} MB of tensors written to {out}")
