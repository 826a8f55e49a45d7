"""Killed and resumed: a run that stops at any moment goes on, and ends in the same bytes."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import tiny_llama
from wanda.checkpoint import tensors, writer
from wanda.errors import ConfigurationError, RunError
from wanda.pipeline import prune
from wanda.plan import Plan

OPTIONS: dict[str, Any] = {"samples": 4, "seqlen": 24, "batch": 2, "dtype": "float32", "progress": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks: a run has fewer writes."""
    return tiny_llama(tmp_path_factory.mktemp("model") / "dense", num_hidden_layers=2)


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors*")}


class Killed(BaseException):
    """The end of a process."""


class Fault:
    """Ends the n-th call that changes the disk below a folder: half of a write is done, of the others nothing.

    killed: no later call does anything either, as if the process were gone; else the disk is full once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, at: int, killed: bool):
        self.count, self.at, self.killed, self.folder = 0, at, killed, str(folder)
        for name in ("fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir", "truncate"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        monkeypatch.setattr(shutil, "copyfile", self.wrap(shutil.copyfile))
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self.opening(module.open))

    def due(self) -> bool:
        self.count += 1
        return self.count == self.at or (self.killed and self.count > self.at)

    def stop(self) -> NoReturn:
        raise Killed if self.killed else OSError(28, "No space left on device")

    def wrap(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.due():
                self.stop()
            return function(*args, **kwargs)

        return call

    def opening(self, function: Any) -> Any:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            stream = function(file, mode, *args, **kwargs)
            if str(file).startswith(self.folder) and set(mode) & set("wax+"):
                write = stream.write

                def half(data: Any) -> int:
                    if not self.due():
                        return int(write(data))
                    if self.count == self.at:
                        write(data[: len(data) // 2])
                        stream.flush()
                    self.stop()

                return Written(stream, half)
            return stream

        return call


class Written:
    """An open file whose write is another."""

    def __init__(self, stream: Any, write: Any):
        self._stream, self.write = stream, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


@pytest.mark.parametrize("killed", [False, True], ids=["full", "killed"])
@pytest.mark.parametrize(
    "options", [{"propagate": "block"}, {"propagate": "layer"}, {"method": "owl", "overwrite": True}]
)
def test_a_fault_at_every_write_leaves_a_resumable_run(
    options: dict[str, Any], killed: bool, short: Path, text: str, tmp_path: Path
) -> None:
    """Every write of every file, flush, rename and removal, also of an earlier folder that is to be replaced."""
    options = OPTIONS | options | {"calibration": text}
    prune(short, out=tmp_path / "whole", **options)
    expected = digests(tmp_path / "whole")
    at, faults, whole = 1, 0, 0
    while True:
        out = tmp_path / f"out{at}"
        if options.get("overwrite"):
            out.mkdir()
            (out / "old.safetensors").touch()
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault = Fault(monkeypatch, tmp_path, at, killed)
            try:
                prune(short, out=out, **options)
                assert fault.count < at
                break  # no write was left to fail
            except RunError as error:
                assert not killed and "No space left" in str(error)
            except Killed:
                assert killed
        faults += 1
        if out.exists() and not (out / "old.safetensors").exists():  # then it is whole, with leftovers at worst
            assert expected.items() <= digests(out).items()
            whole += 1
        prune(short, out=out, resume=True, **options)
        assert digests(out) == expected, f"fault at write {at}"
        assert sorted(file.name for file in out.iterdir()) == sorted(f.name for f in (tmp_path / "whole").iterdir())
        assert not writer.partial_folder(out).exists()
        shutil.rmtree(out)
        at += 1
    assert whole >= 3 and faults > 2 * 12 + 20  # head and tensors, flushes, renames, journal of a block; the rest


def test_sigkill_in_the_middle_of_a_shard(source: Path, text: str, tmp_path: Path) -> None:
    options = OPTIONS | {"calibration": text}
    prune(source, out=tmp_path / "whole", **options)
    out = tmp_path / "out"
    code = f"""
import time
from wanda.checkpoint import tensors
from wanda.pipeline import prune

pieces, count = tensors._pieces, 0

def slow(tensor):  # hangs before the last tensor of the third block
    global count
    count += 1
    if count == 27:
        time.sleep(100)
    yield from pieces(tensor)

tensors._pieces = slow
prune({str(source)!r}, out={str(out)!r}, **{options!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    temporary = writer.partial_folder(out) / "model-00003-of-00005.safetensors.tmp"
    while process.poll() is None and not (temporary.exists() and temporary.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    size = (tmp_path / "whole" / temporary.stem).stat().st_size
    assert 0 < temporary.stat().st_size < size, "killed in the middle"
    prune(source, out=out, resume=True, **options)
    assert digests(out) == digests(tmp_path / "whole")
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize(
    "options",
    [{"method": "best"}, {"method": "sparsegpt"}, {"method": "owl"}, {"propagate": "none"}],
    ids=lambda options: "-".join(options.values()),
)
def test_methods_of_all_kinds_resume(options: dict[str, Any], source: Path, text: str, tmp_path: Path) -> None:
    """With updates, a second stream that replays the input's weights, an allocation, dense statistics."""
    options = OPTIONS | options | {"calibration": text}
    out = stopped(source, tmp_path, options, after=2)
    prune(source, out=out, resume=True, **options)
    prune(source, out=tmp_path / "whole", **options)
    assert digests(out) == digests(tmp_path / "whole")


class Shards:
    """A copy of a model in many files, which can be damaged and mended."""

    def __init__(self, folder: Path):
        self.folder = tiny_llama(folder, max_shard_size="20KB")
        self.index: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def holding(self, key: str) -> Path:
        return self.folder / self.index[key]


def test_a_shard_that_vanishes_half_way_is_named_and_copied_again(text: str, tmp_path: Path) -> None:
    shards, options = Shards(tmp_path / "dense"), OPTIONS | {"calibration": text}
    prune(shards.folder, out=tmp_path / "whole", **options)
    for key in ("model.layers.2.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"):
        file, out = shards.holding(key), tmp_path / key
        kept = file.read_bytes()
        with pytest.MonkeyPatch.context() as monkeypatch:

            def stage(path: Path, *args: Any, file: Path = file, **kwargs: Any) -> Any:
                if path.name.startswith("model-00003"):
                    file.unlink()
                return tensors.stage_file(path, *args, **kwargs)

            monkeypatch.setattr(writer, "stage_file", stage)
            with pytest.raises(RunError, match=f"{file.name}: .* cannot be read .*copy it again") as caught:
                prune(shards.folder, out=out, **options)
        assert "--resume" in str(caught.value) and "free some space" not in str(caught.value)
        with pytest.raises(ConfigurationError, match="lacks 1 of its"):
            prune(shards.folder, out=out, resume=True, **options)
        file.write_bytes(kept)  # another time, another place on the disk
        prune(shards.folder, out=out, resume=True, **options)
        assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("method", ["wanda", "owl"])
@pytest.mark.parametrize("block", [0, 2])
def test_nan_that_was_mended_does_not_keep_a_run_from_going_on(
    block: int, method: str, text: str, tmp_path: Path
) -> None:
    """The mended file may be laid out anew; what counts is what the finished blocks came from."""
    shards, options = Shards(tmp_path / "dense"), OPTIONS | {"calibration": text, "method": method}
    prune(shards.folder, out=tmp_path / "whole", **options)
    key = f"model.layers.{block}.mlp.up_proj.weight"
    file, out = shards.holding(key), tmp_path / "out"
    whole = load_file(file)
    broken = whole[key].clone()
    broken[3, 4] = torch.nan
    save_file(whole | {key: broken}, file, {"format": "pt"})
    with pytest.raises(RunError, match="not finite") as caught:
        prune(shards.folder, out=out, **options)
    assert f"{block if method == 'wanda' else 0} finished blocks are kept" in str(caught.value)
    save_file({"added": torch.zeros(1), **whole}, file, {"format": "pt"})
    save_file(whole, file, {"format": "pt", "mended": "yes"})
    prune(shards.folder, out=out, resume=True, **options)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("key", "part"),
    [("model.layers.1.mlp.up_proj.weight", "block 1"), ("model.embed_tokens.weight", "outside the blocks")],
)
def test_another_input_of_the_same_shape_is_refused_by_the_part(key: str, part: str, text: str, tmp_path: Path) -> None:
    shards, options = Shards(tmp_path / "dense"), OPTIONS | {"calibration": text}
    out = stopped(shards.folder, tmp_path, options, after=2)
    file = shards.holding(key)
    whole = load_file(file)
    save_file(whole | {key: whole[key] * 1.01}, file, {"format": "pt"})
    with pytest.raises(ConfigurationError, match=f"another input .*{part}"):
        prune(shards.folder, out=out, resume=True, **options)
    save_file(whole, file, {"format": "pt"})
    prune(shards.folder, out=out, resume=True, **options)


def test_a_finished_run_is_left_alone_by_resume(source: Path, text: str, tmp_path: Path) -> None:
    """`--resume` may stand in a command that a launcher starts again whatever happened."""
    options = OPTIONS | {"calibration": text}
    out = tmp_path / "out"
    report = prune(source, out=out, resume=True, **options)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()}
    again = prune(source, out=out, resume=True, **options)
    assert again.notes[0] == f"{out} holds the result of this run already: nothing was done"
    assert again.layers == report.layers and again.seconds == report.seconds
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir()}
    other = tiny_llama(tmp_path / "other", seed=1)
    for model, changes, why in (
        (source, {"seed": 1}, r"another recipe \(seed\) and another calibration"),
        (other, {}, "another input"),
    ):
        with pytest.raises(ConfigurationError, match=f"is not empty; choose another folder .* result of {why}"):
            prune(model, out=out, resume=True, **(options | changes))
    with pytest.raises(ConfigurationError, match="is not empty"):
        prune(source, out=out, **options)
    shard = out / "model-00001-of-00005.safetensors"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ConfigurationError, match=f"{shard.name} changed since"):
        prune(source, out=out, resume=True, **options)
    prune(source, out=out, resume=True, overwrite=True, **options)
    assert shard.read_bytes() == kept
    assert not writer.partial_folder(out).exists()


def test_a_run_that_comes_too_late_writes_nothing(source: Path, text: str, tmp_path: Path) -> None:
    """It was planned before the other one had renamed its folder, and has the lock of a new one."""
    options = OPTIONS | {"calibration": text}
    out = tmp_path / "out"
    tokens = Plan.calibration_tokens
    with pytest.MonkeyPatch.context() as monkeypatch:

        def other_first(self: Plan) -> Any:
            monkeypatch.undo()
            prune(source, out=out, **options)
            return tokens(self)

        monkeypatch.setattr(Plan, "calibration_tokens", other_first)
        with pytest.raises(ConfigurationError, match="another run has written"):
            prune(source, out=out, **options)
    assert (out / "wanda.json").exists() and not writer.partial_folder(out).exists()


def test_files_that_cannot_be_read_are_not_blamed_on_the_output(tmp_path: Path) -> None:
    gone = tensors.Entry(tmp_path / "gone.safetensors", "weight", torch.float32, (2, 2), 8, 16)
    for take in (gone.read, lambda: tensors.write_file(tmp_path / "a.safetensors", {"weight": gone}, {})):
        with pytest.raises(RunError, match=r"gone.safetensors: weight cannot be read .*; mend the file or copy it"):
            take()
    (tmp_path / "gone.safetensors").write_bytes(bytes(12))
    with pytest.raises(RunError, match=r"gone.safetensors ends inside weight"):
        tensors.write_file(tmp_path / "a.safetensors", {"weight": gone}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["gone.safetensors"]


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
    with pytest.raises(ConfigurationError, match=r"another recipe \(seed\) and another calibration"):
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

    first = writer.Writer(tmp_path / "out", Checkpoint.open(source), [], {})
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
