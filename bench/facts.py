"""What every result names beside its figures: the machine, its load, threads and versions; and how spread is given."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wanda.report import versions


def processor() -> str:
    """The processor's name as the system gives it."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else "unknown"


def facts() -> dict[str, Any]:
    """The processor's name, its cores, torch's threads, the load average now, and versions."""
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "versions": versions(),
    }


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "max": round(max(values), digits),
    }


def spread_text(values: Mapping[str, float], digits: int = 2) -> str:
    """`median (min-max)`."""
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}-{values['max']:.{digits}f})"


def save(file: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
