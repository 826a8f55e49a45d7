"""A folder to write into: what is refused, by every command alike, before anything is loaded or written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from byhand import prune_by_hand
from wanda.checkpoint import folder
from wanda.checkpoint.packed import pack, unpack
from wanda.errors import ConfigurationError, RunError
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


@pytest.mark.parametrize("command", ["prune", "tune", "merge", "pack", "unpack"])
def test_the_place_beside_is_not_taken_from_others(commands: dict[str, Command], tmp_path: Path, command: str) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(
        ConfigurationError, match=r"out.partial, where --out would be built, exists already; move it away"
    ):
        commands[command](out=tmp_path / "out")
    (tmp_path / "inputs").rename(tmp_path / "new.partial")
    (tmp_path / "inputs").symlink_to("new.partial")
    with pytest.raises(ConfigurationError, match=r"would be built in .*new.partial, where the input is"):
        commands[command](out=tmp_path / "new", overwrite=True)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine" and list((tmp_path / "inputs").iterdir())


@pytest.mark.parametrize("command", ["prune", "pack", "unpack"])
def test_a_link_stays_and_what_it_links_to_is_written(
    commands: dict[str, Command], tmp_path: Path, command: str
) -> None:
    (tmp_path / "disk").mkdir()
    for name, filled in (("old", True), ("new", False)):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        if filled:
            (tmp_path / "disk" / name).mkdir()
            (tmp_path / "disk" / name / "earlier").write_text("")
        commands[command](out=tmp_path / name, overwrite=True)
        assert (tmp_path / name).is_symlink() and (tmp_path / "disk" / name / "config.json").is_file()
        assert not (tmp_path / "disk" / name / "earlier").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "inputs", "new", "old"]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["new", "old"]


@pytest.mark.parametrize("command", ["prune", "tune", "merge", "pack", "unpack"])
def test_a_mounted_disk_is_refused(
    commands: dict[str, Command], tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"is where a disk is mounted.*; choose a folder inside it"):
        commands[command](out=tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(22, "Invalid argument")])
@pytest.mark.parametrize("command", ["prune", "pack", "unpack"])
def test_an_earlier_folder_comes_back_when_its_replacing_fails(
    commands: dict[str, Command], tmp_path: Path, command: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier").write_text("results of a year")
    real = folder.sync_folder

    def failing(path: Path) -> None:
        if not (tmp_path / "out").exists() and path == tmp_path and (tmp_path / "out.partial" / "replaced").exists():
            raise error
        real(path)

    monkeypatch.setattr(folder, "sync_folder", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RunError):
        commands[command](out=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "earlier").read_text() == "results of a year"


@pytest.mark.parametrize("command", ["prune", "tune", "pack", "unpack"])
def test_what_a_killed_run_has_set_aside_is_not_lost_to_the_next_one(
    commands: dict[str, Command], tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two renames leaves the earlier folder in the partial one only."""
    aside = tmp_path / "out.partial" / ("result" if command == "tune" else "") / "replaced"
    aside.mkdir(parents=True)
    (aside / "earlier").write_text("results of a year")
    with pytest.raises(ConfigurationError, match=r"out.partial.* exists already.*--overwrite"):
        commands[command](out=tmp_path / "out")
    stopped = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    monkeypatch.setattr("wanda.recovery.tune.load_model", lambda *_: None)
    monkeypatch.setattr("wanda.recovery.tune.read_masks", lambda *_: SimpleNamespace(parameters={}, matrices=[]))
    for place in ("recovery.tune.replace_file", "checkpoint.packed.write_file", "block_loop.BlockLoop.run"):
        monkeypatch.setattr(f"wanda.{place}", stopped)
    with pytest.raises(KeyboardInterrupt):
        commands[command](out=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "earlier").read_text() == "results of a year"


@pytest.mark.parametrize("command", ["prune", "tune", "merge", "pack", "unpack"])
def test_a_file_in_the_place_beside_is_refused(commands: dict[str, Command], tmp_path: Path, command: str) -> None:
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"out.partial, where --out would be built, is a file; remove it"):
        commands[command](out=tmp_path / "out", overwrite=True)


def test_files_that_are_read_are_not_written_over(
    commands: dict[str, Command], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    text = tmp_path / "text" / "t.txt"
    text.write_text("the quick brown fox " * 99)
    (tmp_path / "text" / "m.gguf").write_bytes(b"GGUF")
    for name in ("wanda.plan.resolve", "wanda.checkpoint.packed.resolve"):
        monkeypatch.setattr(name, lambda *_: tiny)  # the cache's folder of a .gguf file
    for refused in (
        lambda: prune(tiny, out=tmp_path / "text", calibration=str(text), overwrite=True),
        lambda: prune(tiny, out=tmp_path / "text", calibration=f"images:{tmp_path / 'text'}", overwrite=True),
        lambda: tune(tiny, out=tmp_path / "text", full=True, calibration=f"{text}", overwrite=True),
        lambda: prune(tmp_path / "text" / "m.gguf", out=tmp_path / "text", method="magnitude", overwrite=True),
        lambda: pack(str(tmp_path / "text" / "m.gguf"), tmp_path / "text", overwrite=True),
        lambda: merge(tiny, tmp_path / "text" / "m.gguf", out=tmp_path / "text", overwrite=True),
    ):
        with pytest.raises(ConfigurationError, match="never written to; choose another folder"):
            refused()
    assert text.exists()


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
