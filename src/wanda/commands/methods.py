"""`wanda methods`: what there is, one line each with its paper."""

from __future__ import annotations


def methods_command() -> None:
    """List the methods, scores, updates and allocations, each with its paper."""
    from rich.console import Console
    from rich.table import Table

    from wanda.allocation import ALLOCATIONS
    from wanda.methods import METHODS
    from wanda.scores import SCORES
    from wanda.updates import UPDATES

    console = Console()
    for registry in (METHODS, SCORES, UPDATES, ALLOCATIONS):
        table = Table(
            title=f"--{registry.kind}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name in registry.names():
            table.add_row(name, registry.summary(name))
        console.print(table)
        console.print()
    console.print("--group row, layer, column, block:K; --pattern N:M (N survive of every M inputs)")
