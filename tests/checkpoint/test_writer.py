"""A folder to write into: what is refused, by every command alike, before anything is loaded or written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from byhand import prune_by_hand
from wanda.checkpoint.packed import pack, unpack
from wanda.errors import ConfigurationError
from wanda.pipeline import prune
from wanda.recovery.merge import merge
from wanda.recovery.tune import tune

Command = Callable[..., object]


@pytest.fixture
def commands(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Command]:
    """Every command that writes a checkpoint, as command(out=..., overwrite=..., resume=...); none gets to loading."""
    pytest.importorskip("peft")
    inputs = tmp_path / "inputs"
    pruned = prune_by_hand(tiny, inputs / "pruned")
    pack(str(pruned), inputs / "packed")
    for name in ("wanda.recovery.tune.load_model", "wanda.recovery.merge.load_model"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("loaded"))
    return {
        "prune": lambda **options: prune(pruned, method="magnitude", progress=False, **options),
        "tune": lambda **options: tune(pruned, full=True, calibration="builtin", **options),
        "merge": lambda **options: merge(pruned, inputs / "adapter", **options),
        "pack": lambda **options: pack(str(pruned), **options),
        "unpack": lambda **options: unpack(inputs / "packed", **options),
    }


@pytest.mark.parametrize(("owner", "file"), [("prune", "journal.jsonl"), ("tune", "tune.json")])
@pytest.mark.parametrize("command", ["prune", "tune", "merge", "pack", "unpack"])
def test_a_stopped_run_is_not_deleted_unasked(
    commands: dict[str, Command], tmp_path: Path, command: str, owner: str, file: str
) -> None:
    kept = tmp_path / "out.partial" / file
    kept.parent.mkdir()
    kept.write_text("{}")
    resumes = [{}, {"resume": True}] if command in ("prune", "tune") and command != owner else [{}]
    for options in resumes:
        with pytest.raises(ConfigurationError, match=f"an unfinished run of wanda {owner}; go on .*--overwrite"):
            commands[command](out=tmp_path / "out", **options)
    assert kept.read_text() == "{}" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["prune", "pack", "unpack"])
def test_overwrite_discards_a_stopped_tune(commands: dict[str, Command], tmp_path: Path, command: str) -> None:
    partial = tmp_path / "out.partial"
    (partial / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (partial / "tune.json").write_text("{}")
    commands[command](out=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").exists() and not partial.exists()
    assert not (tmp_path / "out" / "checkpoints").exists() and not (tmp_path / "out" / "tune.json").exists()


@pytest.mark.parametrize("command", ["prune", "tune", "merge", "pack", "unpack"])
def test_a_folder_that_cannot_be_made_is_refused_before_loading(
    commands: dict[str, Command], tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot be made: .*file is a file; choose another folder"):
        commands[command](out=tmp_path / "file" / "out")
    with pytest.raises(ConfigurationError, match=r"holds the input .*; choose another folder"):
        commands[command](out=tmp_path / "inputs", overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigurationError, match=r"is not writable; choose another folder"):
        commands[command](out=tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
