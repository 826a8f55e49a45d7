"""Results that runs share: made once for what they depend on, and counted as if each run had made them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wanda.errors import ConfigurationError
from wanda.shared import Shared


def test_made_once_for_what_it_depends_on(tmp_path: Path) -> None:
    made: list[int] = []

    def take(shared: Shared, name: str, value: int) -> list[int]:
        return shared.take(name, lambda: {"value": value}, lambda: made.append(value) or [value, value])

    first, second = Shared(tmp_path), Shared(tmp_path)
    assert take(first, "figures", 1) == [1, 1] and take(first, "figures", 2) == [2, 2]
    assert (first.seconds, first.peak_memory, first.notes()) == (0, 0, [])
    assert take(second, "figures", 1) == [1, 1] and take(second, "others", 1) == [1, 1]
    assert made == [1, 2, 1]
    kept = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert second.seconds in [row["seconds"] for row in kept] and second.seconds > 0
    assert second.peak_memory in [row["peak_memory"] for row in kept] and second.peak_memory > 1e6
    assert second.notes() == [
        f"taken from an earlier run: figures; the {second.seconds:.1f} s that this took there are counted here"
    ]
    alone = Shared()
    assert take(alone, "figures", 1) == [1, 1] and made == [1, 2, 1, 1]


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no folder"):
        Shared(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match="this one has 2"):
        Shared(tmp_path, world=2)
