"""Killed and resumed: a run that stops at any moment goes on, and ends in the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from models import LINES, tiny_llama
from wanda.checkpoint import tensors, writer
from wanda.errors import ConfigurationError, RunError
from wanda.pipeline import prune

OPTIONS: dict[str, Any] = {"samples": 4, "seqlen": 24, "batch": 2, "dtype": "float32", "progress": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(LINES * 40), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "dense")


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors*")}


class Fault:
    """Raises OSError (disk full) at the n-th call of any of the functions that touch the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int):
        self.count, self.at = 0, at
        for module, name in ((os, "fsync"), (os, "replace"), (os, "link")):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("options", [{"propagate": "block"}, {"propagate": "layer"}, {"method": "owl"}])
def test_a_fault_at_every_write_leaves_a_resumable_run(
    options: dict[str, Any], source: Path, text: str, tmp_path: Path
) -> None:
    options = OPTIONS | options | {"calibration": text}
    prune(source, out=tmp_path / "whole", **options)
    expected = digests(tmp_path / "whole")
    at, faults = 1, 0
    while True:
        out = tmp_path / f"out{at}"
        with pytest.MonkeyPatch.context() as monkeypatch:
            Fault(monkeypatch, at)
            try:
                prune(source, out=out, **options)
                break  # no write was left to fail
            except RunError as error:
                assert "No space left" in str(error)
                faults += 1
        assert not out.exists() or digests(out) == expected
        if not out.exists():
            prune(source, out=out, resume=True, **options)
        assert digests(out) == expected, f"fault at write {at}"
        at += 1
    assert faults > 4 * 4  # at least shard, folder and journal of each of the four blocks


@pytest.mark.parametrize("propagate", ["block", "layer"])
def test_killed_runs_resume_to_the_same_bytes(propagate: str, source: Path, text: str, tmp_path: Path) -> None:
    options = OPTIONS | {"propagate": propagate, "calibration": text}
    prune(source, out=tmp_path / "whole", **options)
    code = f"from wanda.pipeline import prune; prune({str(source)!r}, out=OUT, resume=True, **{options!r})"
    draw = random.Random(5)
    for attempt in range(3):
        out = tmp_path / f"out{attempt}"
        command = [sys.executable, "-c", code.replace("OUT", repr(str(out)))]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        journal = writer.partial_folder(out) / "journal.jsonl"
        while not journal.exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        prune(source, out=out, resume=not out.exists(), overwrite=out.exists(), **options)
        assert digests(out) == digests(tmp_path / "whole")
        assert not writer.partial_folder(out).exists()


def test_a_journal_cut_in_the_middle_of_a_line_loses_that_block_only(source: Path, text: str, tmp_path: Path) -> None:
    options = OPTIONS | {"calibration": text}
    out = stopped(source, tmp_path, options, after=3)
    journal = writer.partial_folder(out) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    prune(source, out=out, resume=True, **options)
    prune(source, out=tmp_path / "whole", **options)
    assert digests(out) == digests(tmp_path / "whole")


def stopped(source: Path, folder: Path, options: dict[str, Any], after: int) -> Path:
    """A run that met a full disk after some blocks."""
    out = folder / "stopped"
    with pytest.MonkeyPatch.context() as monkeypatch:
        count = 0

        def stage(path: Path, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > after:
                raise RunError("disk full")
            return tensors.stage_file(path, *args, **kwargs)

        monkeypatch.setattr(writer, "stage_file", stage)
        with pytest.raises(RunError, match=f"{after} finished blocks are kept .* --resume"):
            prune(source, out=out, **options)
    return out


def test_resuming_something_else_is_refused_by_name(source: Path, text: str, tmp_path: Path) -> None:
    options = OPTIONS | {"calibration": text}
    out = stopped(source, tmp_path, options, after=2)
    with pytest.raises(ConfigurationError, match=r"another recipe and another calibration.*\(seed\)"):
        prune(source, out=out, resume=True, **(options | {"seed": 1}))
    other = tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(ConfigurationError, match="another input"):
        prune(other, out=out, resume=True, **options)
    Path(text).touch()  # another time, the same tokens: this is the same run
    with pytest.raises(ConfigurationError, match=r"unfinished run of wanda prune; go on .* --resume, start anew"):
        prune(source, out=out, **options)
    prune(source, out=out, resume=True, **options)
    prune(source, out=out, overwrite=True, **options)


def test_a_second_run_at_the_same_time_is_refused(source: Path, text: str, tmp_path: Path) -> None:
    from wanda.checkpoint.reader import Checkpoint

    first = writer.Writer(tmp_path / "out", Checkpoint.open(source), {}, resume=False)
    with pytest.raises(ConfigurationError, match="another run is writing"):
        prune(source, out=tmp_path / "out", calibration=text, resume=True, **OPTIONS)
    first.close()
    prune(source, out=tmp_path / "out", calibration=text, overwrite=True, **OPTIONS)


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(source: Path, text: str, tmp_path: Path) -> None:
    options = OPTIONS | {"calibration": text}
    with pytest.MonkeyPatch.context() as monkeypatch:

        def stage(*args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(writer, "stage_file", stage)
        with pytest.raises(KeyboardInterrupt, match="go on with --resume"):
            prune(source, out=tmp_path / "out", **options)
    prune(source, out=tmp_path / "out", resume=True, **options)


def test_memory_caps_change_the_plan_and_not_the_masks(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanda.plan.resident_memory", lambda: 400 << 20)  # this process grows as the suite runs
    options = OPTIONS | {"calibration": text, "propagate": "block"}
    prune(source, out=tmp_path / "whole", **options)
    plan = prune(source, out=tmp_path / "file", dry_run=True, **options)
    cap = f"{plan.memory - 1000}"
    report = prune(source, out=tmp_path / "file", memory=cap, **options)
    assert any("activations go to a file" in note for note in report.notes)
    assert digests(tmp_path / "file") == digests(tmp_path / "whole")
