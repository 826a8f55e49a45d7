"""The errors of the package, drawn once.

WandaError                what a user can do something about; its text names the thing, the reason and the cure
  ConfigurationError      exit code 2: asked for something impossible; nothing was loaded, nothing was written
    MissingExtraError     an optional dependency is not installed
  RunError                exit code 1: went wrong on the way; what was finished is kept where that is possible
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class WandaError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1


class ConfigurationError(WandaError):
    """One or more faults in what was asked for, all in one message; nothing was loaded or written."""

    exit_code = 2

    def __init__(self, faults: str | Sequence[str]):
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        text = self.faults[0] if len(self.faults) == 1 else "\n".join(f"- {fault}" for fault in self.faults)
        super().__init__(text)


class MissingExtraError(ConfigurationError):
    """An optional dependency is missing; the message carries its install line."""

    def __init__(self, what: str, package: str, extra: str):
        super().__init__(f"{what} needs the package {package}: pip install 'wanda-prune[{extra}]'")


class RunError(WandaError):
    """A fault on the way: bad numbers, a full disk, a file that turned unreadable."""


def near(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known ones, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
