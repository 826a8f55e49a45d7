"""What runs on one model can share: an intermediate result is kept in a folder, under what it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from wanda.errors import ConfigurationError
from wanda.memory import peak_memory

T = TypeVar("T")


class Shared:
    """Results kept in a folder, for the runs of one comparison; without a folder each run works on its own.

    folder: of one model, device and version of the library. world: processes of the run, which share nothing here.
    seconds, peak_memory: what the results that were found took, and the peak in bytes, in the runs that made them.
    found: their names.
    """

    def __init__(self, folder: Path | None = None, world: int = 1):
        if folder is not None and world > 1:
            raise ConfigurationError(f"--shared is for runs of one process, this one has {world}; leave it away")
        if folder is not None and not folder.is_dir():
            raise ConfigurationError(f"--shared {folder} is no folder; make it, or leave --shared away")
        self.folder = folder
        self.seconds, self.peak_memory = 0.0, 0
        self.found: list[str] = []

    def take(self, name: str, depends: Callable[[], Mapping[str, Any]], make: Callable[[], T]) -> T:
        """What an earlier run kept under this name and what it depends on, else what `make` gives; all must be JSON."""
        if self.folder is None:
            return make()
        key = hashlib.sha256(json.dumps([name, depends()], sort_keys=True).encode()).hexdigest()
        file = self.folder / f"{key}.json"
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            self.seconds += kept["seconds"]
            self.peak_memory = max(self.peak_memory, kept["peak_memory"])
            self.found.append(name)
            return kept["value"]
        start = time.perf_counter()
        value = make()
        made = {"value": value, "seconds": time.perf_counter() - start, "peak_memory": peak_memory()}
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(made), encoding="utf-8")
        partial.replace(file)
        return value

    def notes(self) -> list[str]:
        """One sentence on what was found, none when nothing was."""
        if not self.found:
            return []
        what = " and ".join(self.found)
        return [f"taken from an earlier run: {what}; the {self.seconds:.1f} s that this took there are counted here"]
