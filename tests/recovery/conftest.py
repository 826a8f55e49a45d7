"""A tiny model pruned by hand, and text to tune it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from byhand import prune_by_hand


@pytest.fixture
def pruned(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """pruned(name, pattern=..., recipe=...): the tiny model, half of its blocks' weights removed."""
    return lambda name="pruned", **options: prune_by_hand(tiny, tmp_path / name, **options)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text that a tiny model can learn something of."""
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog and the dog sleeps on. " * 60, encoding="utf-8")
    return str(file)
