"""Writing a checkpoint so that it is whole or absent, and a killed run can go on.

Everything is built in DIR.partial and renamed once at the end. Each finished block is a shard of its own: written under
a temporary name, flushed, renamed; then one line of the journal, flushed, says that it is done. A line that a kill cut
short is dropped, and so is its block. The order matters: a line in the journal means that its shard is on the disk.
From the flush on all that happens, in this order, on a thread, while the next block is computed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.source import is_timm, read_config
from wanda.checkpoint.tensors import Entry, read_header, stage_file, sync_folder, write_file
from wanda.errors import ConfigurationError, RunError

INDEX = "model.safetensors.index.json"
_JOURNAL = "journal.jsonl"
TUNE_IDENTITY = "tune.json"
_RUNS = {_JOURNAL: "prune", TUNE_IDENTITY: "tune"}  # the file that a stopped run left, and whose run it is
_LOCK = "lock"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_OURS = ("README.md", "wanda.json", _JOURNAL, _LOCK)


def output_faults(
    out: Path, source: Path | None, overwrite: bool, resume: bool, command: Literal["prune", "tune"] = "prune"
) -> list[str]:
    """Why `out` cannot be written, one sentence each; writes nothing.

    source: the input, which must not be lost. resume: go on with a stopped run of `command`; any other stopped run is
    somebody's work, which only `overwrite` gives up.
    """
    faults = []
    if source is not None and out.resolve() == source.resolve():
        faults.append(f"--out {out} is the input itself, which is never written to; choose another folder")
    elif source is not None and out.resolve() in source.resolve().parents:
        faults.append(f"--out {out} holds the input {source}, which is never written to; choose another folder")
    elif out.exists() and not out.is_dir():
        faults.append(f"--out {out} is a file; choose a folder")
    elif out.is_dir() and any(out.iterdir()) and not overwrite:
        faults.append(f"--out {out} is not empty; choose another folder or pass --overwrite")
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    if existing.is_dir() and not os.access(existing if existing != out.absolute() else existing.parent, os.W_OK):
        faults.append(f"--out {out} cannot be made: {existing} is not writable; choose another folder")
    elif not existing.is_dir() and existing != out.absolute():
        faults.append(f"--out {out} cannot be made: {existing} is a file; choose another folder")
    partial = partial_folder(out)
    for file, owner in _RUNS.items():
        if not overwrite and not (resume and command == owner) and (partial / file).exists():
            faults.append(
                f"{partial} holds an unfinished run of wanda {owner}; go on with it by its --resume, start anew with "
                "--overwrite, or choose another --out"
            )
    return faults


def partial_folder(out: Path) -> Path:
    """Where `out` is built before it is renamed."""
    return out.absolute().with_name(out.absolute().name + ".partial")


def journaled(out: Path) -> dict[str, Any]:
    """The facts that an unfinished run under `out` has journaled; empty where there is none."""
    facts: dict[str, Any] = {}
    for line, _ in _lines(partial_folder(out) / _JOURNAL):
        facts.update(line.get("facts", {}))
    return facts


class Writer:
    """The folder DIR.partial of one run, locked against a second one.

    identity: what makes this run this run (recipe, input, calibration tokens); a resumed run must have the same.
    done: per finished block, in order, the rows that were journaled with it.
    facts: what else was journaled (the allocation, say).
    """

    def __init__(self, out: Path, source: Checkpoint, identity: Mapping[str, Any], resume: bool):
        self.out, self.source, self.folder = out.absolute(), source, partial_folder(out)
        self.done: list[list[dict[str, Any]]] = []
        self.facts: dict[str, Any] = {}
        self._blocks: list[list[str]] = []
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / _LOCK, "w", encoding="ascii")  # noqa: SIM115
        except OSError as error:
            raise RunError(f"{self.folder} cannot be made: {error.strerror}; choose another --out") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigurationError(
                f"another run is writing {self.out}; wait for it or choose another --out"
            ) from None
        try:
            if resume:
                self._read_journal(identity)
            if not self._blocks and not self.facts:
                self._clear()
                self._append({"identity": dict(identity)})
        except BaseException:
            self._lock.close()
            raise

    def write_block(self, index: int, tensors: Mapping[str, Tensor | Entry], rows: list[dict[str, Any]]) -> None:
        """Write block `index` (tensors by disk key) as a shard and journal its report rows.

        The tensors are written on return; flushing and journaling go on meanwhile. Raises RunError for this block, or
        for the one before if that failed after its return.
        """
        self._settle()
        commit = stage_file(self.folder / f"block-{index:05d}.safetensors", tensors, {"format": "pt"})
        keys = list(tensors)

        def finish_block() -> None:
            commit()
            self._append({"block": index, "rows": rows})
            self._blocks.append(keys)
            self.done.append(rows)

        self._pending = self._thread.submit(finish_block)

    def block_entries(self, index: int) -> dict[str, Entry]:
        """The tensors of a finished block, by disk key."""
        return read_header(self.folder / f"block-{index:05d}.safetensors")[0]

    def note(self, **facts: Any) -> None:
        """Journal something else that a resumed run has to know."""
        self.facts.update(facts)
        self._append({"facts": facts})

    def finish(self, files: Mapping[str, str]) -> None:
        """Write the tensors outside the blocks, the index, the input's other files and `files` (name to text), rename.

        A model of timm's format is one file, which is all that timm reads. From here on a kill leaves either a
        resumable DIR.partial or the whole DIR.
        """
        self._settle()
        inside = {key for keys in self._blocks for key in keys}
        outside = {key: entry for key, entry in self.source.entries.items() if key not in inside}
        single = is_timm(read_config(self.source.folder))
        count = 0 if single else len(self._blocks) + bool(outside)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if single:
            blocks = {k: e for index in range(len(self._blocks)) for k, e in self.block_entries(index).items()}
            write_file(self.folder / "model.safetensors", blocks | outside, {"format": "pt"})
        elif outside:
            write_file(self.folder / names[-1], outside, {"format": "pt"})
        weight_map = {
            key: name for name, keys in zip(names, [*self._blocks, list(outside)], strict=False) for key in keys
        }
        index_text = {"metadata": {"total_size": self.source.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        try:
            for index, name in enumerate(names[: len(self._blocks)]):
                if not (self.folder / name).exists():  # the block's own name stays until the end, for a resumed run
                    os.link(self.folder / f"block-{index:05d}.safetensors", self.folder / name)
            for file in sorted(self.source.folder.iterdir()):
                if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in _OURS:
                    shutil.copyfile(file, self.folder / file.name)
                    _sync(self.folder / file.name)
            for name, text in {**({} if single else {INDEX: json.dumps(index_text, indent=2) + "\n"}), **files}.items():
                (self.folder / name).write_text(text, encoding="utf-8")
                _sync(self.folder / name)
            sync_folder(self.folder)
            for index in range(len(self._blocks)):
                (self.folder / f"block-{index:05d}.safetensors").unlink()
            (self.folder / _JOURNAL).unlink()
            (self.folder / _LOCK).unlink()
            sync_folder(self.folder)
            replace_folder(self.folder, self.out)
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be finished: {error.strerror}; free some space and --resume"
            ) from error
        self._lock.close()

    def close(self) -> None:
        """Let go of the folder, leaving it for --resume, once the last block is on the disk or has failed."""
        with contextlib.suppress(RunError):  # the run ends with an earlier error, or has raised this one already
            self._settle()
        self._thread.shutdown()
        self._lock.close()

    def _settle(self) -> None:
        """Wait for the block that is being flushed; raises its RunError."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with open(self.folder / _JOURNAL, "a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
            sync_folder(self.folder)
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be written: {error.strerror}; free some space and --resume"
            ) from error

    def _read_journal(self, identity: Mapping[str, Any]) -> None:
        path = self.folder / _JOURNAL
        lines = [line for line, _ in _lines(path)]
        if not lines:
            return
        then = lines[0].get("identity", {})
        different = [name for name in identity if json.loads(json.dumps(identity[name])) != then.get(name)]
        if different:
            raise ConfigurationError(
                f"{self.folder} was begun with another {' and another '.join(different)}{_which(then, identity)}; "
                "resume with the same, choose another --out, or start anew with --overwrite"
            )
        os.truncate(path, sum(length for _, length in _lines(path)))
        for line in lines[1:]:
            self.facts.update(line.get("facts", {}))
            if "block" in line:
                self._blocks.append(list(self.block_entries(line["block"])))
                self.done.append(line["rows"])

    def _clear(self) -> None:
        for file in self.folder.iterdir():
            if file.is_dir() and not file.is_symlink():  # a stopped run of tune has folders
                shutil.rmtree(file)
            elif file.name != _LOCK:
                file.unlink()


def _lines(journal: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole lines of a journal and their bytes; what a kill has cut short, and what follows, never happened."""
    try:
        text = journal.read_bytes()
    except FileNotFoundError:
        return
    for raw in text.splitlines(keepends=True):
        try:
            line = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            line = None
        if line is None:
            return
        yield line, len(raw)


def _which(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = then.get("recipe"), now.get("recipe")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ""
    names = [name for name in new if json.loads(json.dumps(new[name])) != old.get(name)]
    return f" ({', '.join(names)})" if names else ""


def replace_folder(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`, putting an earlier `out` aside until that is done, then removing it."""
    aside = None
    if out.exists():
        aside = out.with_name(out.name + ".replaced")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(out, aside)
    os.replace(partial, out)
    sync_folder(out.parent)
    if aside is not None:
        shutil.rmtree(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
