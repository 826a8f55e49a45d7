"""Folders that a later run uses again: beside each lies what it was made from, and a run that wants another is refused.

Refused rather than made anew: some of them are hours of work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def kept(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `folder` is there and was made from `settings`; ends the program when it was made from others."""
    if not folder.exists():
        return False
    file = _settings_file(folder)
    if not file.exists():
        sys.exit(f"nothing says which settings {folder} was made from ({file.name} is missing); {_CURE}")
    then, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    if different := _different(then, now):
        sys.exit(f"{folder} was made from other settings ({'; '.join(different)}); {_CURE}")
    return True


def note(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write down what `folder` is about to be made from, before it has its name: no kill leaves a wrong one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _settings_file(folder).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


_CURE = "remove that folder to have it made anew, or name another one"


def _settings_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.settings.json")


def _different(then: Any, now: Any, at: str = "") -> list[str]:
    """`place: then, not now` for every leaf that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        places = [(name, then.get(name), now.get(name)) for name in {**then, **now}]
        return [line for name, a, b in places for line in _different(a, b, f"{at}.{name}" if at else name)]
    return [] if then == now else [f"{at}: {json.dumps(then)}, not {json.dumps(now)}"]
