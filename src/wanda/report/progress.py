"""What is seen while a run works: a bar over blocks on a terminal, a log line a block elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from wanda.memory import peak_memory


class Progress:
    """Progress over the blocks of a run, on standard error; `shown` False keeps silent."""

    def __init__(self, blocks: int, shown: bool = True, doing: str = "pruning"):
        self.blocks, self.shown, self.doing = blocks, shown, doing
        self.console = Console(file=sys.stderr)
        self.bar: Bar | None = None
        self.start = time.perf_counter()

    def __enter__(self) -> Progress:
        self.start = time.perf_counter()
        if self.shown and self.console.is_terminal:
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the others leave
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True)),
                console=self.console,
                expand=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.doing, total=self.blocks, detail="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def measured(self, index: int) -> None:
        """Block `index` was measured for the allocation."""
        if self.bar is not None:
            self.bar.update(self.task, detail=f"measuring block {index + 1} of {self.blocks} for the allocation")
        elif self.shown:
            self._log(f"measured block {index + 1}/{self.blocks} for the allocation")

    def block(self, index: int, rows: list[dict[str, Any]] | None = None) -> None:
        """Block `index` is finished; rows: its matrices' report rows, where it was pruned."""
        if not self.shown:
            return
        parts = []
        if rows is not None:
            weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
            parts.append(f"{sum(row['removed'] for row in rows) / weights:.1%} sparse" if weights else "left dense")
        errors = [row for row in rows or () if row["relative_error"] is not None]
        if errors:
            mean = sum(row["relative_error"] for row in errors) / len(errors)
            parts.append(f"error {mean:.3f}" if errors[0]["error"] == "exact" else f"error about {mean:.3f}")
        parts.append(f"peak {peak_memory() / 1e9:.2f} GB")
        if self.bar is not None:
            self.bar.update(self.task, completed=index + 1, detail=", ".join(parts))
        else:
            spent = time.perf_counter() - self.start
            left = spent / (index + 1) * (self.blocks - index - 1)
            self._log(f"block {index + 1}/{self.blocks}: {', '.join(parts)}; {spent:.0f} s, about {left:.0f} s left")

    def _log(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
