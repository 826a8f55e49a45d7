"""Writing a checkpoint so that it is whole or absent, and a killed run can go on.

Everything is built in DIR.partial and renamed once at the end. Each finished block is a shard of its own: written under
a temporary name, flushed, renamed; then one line of the journal, flushed, says that it is done. A line that a kill cut
short is dropped, and so is its block. The order matters: a line in the journal means that its shard is on the disk.
From the flush on all that happens, in this order, on a thread, while the next block is computed.

Nothing is taken away before the rename: journal, lock and an earlier DIR go with it, then they are removed.
An input is known by what it holds: the journal has a digest of every tensor that the finished blocks came from.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from wanda.checkpoint.folder import (
    INDEX,
    JOURNAL,
    LOCK,
    REPLACED,
    REPORT,
    WEIGHTS,
    empty_folder,
    filled,
    locked,
    partial_folder,
    replace_folder,
)
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.source import is_timm, read_config
from wanda.checkpoint.tensors import (
    Entry,
    file_digest,
    file_pieces,
    read_header,
    stage_file,
    sync_folder,
    write_file,
)
from wanda.errors import ConfigurationError, RunError

_OURS = ("README.md", REPORT, JOURNAL, LOCK)
_OUTSIDE = "the tensors outside the blocks"


def journaled(out: Path) -> dict[str, Any]:
    """The facts that an unfinished run under `out` has journaled; empty where there is none."""
    facts: dict[str, Any] = {}
    for line, _ in _lines(partial_folder(out) / JOURNAL):
        facts.update(line.get("facts", {}))
    return facts


class Writer:
    """The folder DIR.partial of one run, locked against a second one.

    blocks: of every block, the names of its tensors on disk.
    identity: what makes this run this run (recipe, input, calibration tokens); a resumed run must have the same.
    done: per finished block, in order, the rows that were journaled with it.
    facts: what else was journaled (the allocation, say).
    """

    def __init__(
        self,
        out: Path,
        source: Checkpoint,
        blocks: Sequence[Sequence[str]],
        identity: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
    ):
        self.out, self.source, self.folder = out.absolute(), source, partial_folder(out)
        self.identity, self.blocks = dict(identity), blocks
        self.done: list[list[dict[str, Any]]] = []
        self.facts: dict[str, Any] = {}
        self._parts = _parts(source, blocks)
        self._contents: dict[str, str] = {}  # of the input's parts that were looked at
        self._files: dict[str, str] = {}  # digests of the shards that were written
        self._single = is_timm(read_config(source.folder))  # timm reads one file
        self._count = len(blocks) + bool(self._parts[_OUTSIDE])
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._lock = locked(self.folder, self.out)
        try:
            if filled(self.out) and not overwrite:  # since it was planned
                if [file.name for file in self.folder.iterdir()] == [LOCK]:
                    (self.folder / LOCK).unlink()
                    self.folder.rmdir()
                raise ConfigurationError(f"another run has written {self.out} meanwhile; choose another --out")
            if resume:
                self._read_journal()
            if not self.done and not self.facts:
                empty_folder(self.folder, self.out)
                self._append({"identity": self.identity})
        except BaseException:
            self._lock.close()
            raise

    def write_block(self, index: int, tensors: Mapping[str, Tensor | Entry], rows: list[dict[str, Any]]) -> None:
        """Write block `index` (tensors by disk key) as a shard and journal its report rows.

        The tensors are written on return; flushing and journaling go on meanwhile. Raises RunError for this block, or
        for the one before if that failed after its return.
        """
        self._settle()
        name = self._name(index)
        commit = stage_file(self.folder / name, tensors, {"format": "pt"})

        def finish_block() -> None:
            seen = {part: self._content(part) for part in (_OUTSIDE, _block(index))}
            digest = commit()
            self._append({"block": index, "rows": rows, "file": digest, "input": seen})
            self._files[name] = digest
            self.done.append(rows)

        self._pending = self._thread.submit(finish_block)

    def block_entries(self, index: int) -> dict[str, Entry]:
        """The tensors of a finished block, by disk key."""
        return read_header(self.folder / self._name(index))[0]

    def look_at(self, index: int) -> None:
        """Take the digest of a block of the input that something noted next comes from, while the system has it."""
        self._content(_block(index))

    def note(self, **facts: Any) -> None:
        """Journal something else that a resumed run has to know, which comes from the blocks that were looked at."""
        self.facts.update(facts)
        if self._contents:
            self._content(_OUTSIDE)
        self._append({"facts": facts, "input": self._contents})

    def write_rest(self) -> dict[str, Any]:
        """Write the tensors outside the blocks; returns what `finished` knows the result by.

        A model of timm's format becomes one file, which is all that timm reads.
        """
        self._settle()
        outside: dict[str, Tensor | Entry] = {key: self.source.entries[key] for key in self._parts[_OUTSIDE]}
        if self._single:
            for index in range(len(self.blocks)):
                outside |= self.block_entries(index)
            name = "model.safetensors"
            self._files = {name: write_file(self.folder / name, outside, {"format": "pt"})}
        elif outside:
            name = self._name(len(self.blocks))
            self._files[name] = write_file(self.folder / name, outside, {"format": "pt"})
        return {**self.identity, "tensors": {part: self._content(part) for part in self._parts}, "files": self._files}

    def finish(self, files: Mapping[str, str]) -> None:
        """Write the index, the input's other files and `files` (name to text), rename, remove what is not the result's.

        Comes after `write_rest`. A kill leaves either a resumable DIR.partial or the whole DIR, which may still hold
        the journal, the lock and what was there before; `finished` removes them.
        """
        keys = [*self.blocks, self._parts[_OUTSIDE]]
        weight_map = {key: self._name(index) for index in range(self._count) for key in keys[index]}
        index_text = {"metadata": {"total_size": self.source.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        texts = {} if self._single else {INDEX: json.dumps(index_text, indent=2) + "\n"}
        try:
            for file in sorted(self.source.folder.iterdir()):
                if file.is_file() and not file.name.endswith(WEIGHTS) and file.name not in _OURS:
                    with open(self.folder / file.name, "wb") as copy:
                        for piece in file_pieces(file):
                            copy.write(piece)
                        copy.flush()
                        os.fsync(copy.fileno())
            for name, text in {**texts, **files}.items():
                with open(self.folder / name, "w", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
            sync_folder(self.folder)
            replace_folder(self.folder, self.out)
            _tidy(self.out, len(self.blocks))
        except OSError as error:
            if self.folder.exists():
                raise RunError(
                    f"{self.folder} cannot be finished: {error.strerror}; free some space and --resume"
                ) from error
            raise RunError(_untidy(self.out, error)) from error
        self._lock.close()

    def close(self) -> None:
        """Let go of the folder, leaving it for --resume, once the last block is on the disk or has failed."""
        with contextlib.suppress(RunError):  # the run ends with an earlier error, or has raised this one already
            self._settle()
        self._thread.shutdown()
        self._lock.close()

    def _name(self, index: int) -> str:
        """The file of a block, or, after the last one, of what is outside the blocks."""
        return _part_name(index) if self._single else f"model-{index + 1:05d}-of-{self._count:05d}.safetensors"

    def _content(self, part: str) -> str:
        if part not in self._contents:
            self._contents[part] = self.source.content(self._parts[part])
        return self._contents[part]

    def _settle(self) -> None:
        """Wait for the block that is being flushed; raises its RunError."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with open(self.folder / JOURNAL, "a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
            sync_folder(self.folder)
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be written: {error.strerror}; free some space and --resume"
            ) from error

    def _read_journal(self) -> None:
        path = self.folder / JOURNAL
        found = list(_lines(path))
        lines = [line for line, _ in found]
        if not lines:
            return
        self._refuse(_differences(lines[0].get("identity", {}), self.identity))
        seen: dict[str, str] = {}
        for line in lines[1:]:
            self.facts.update(line.get("facts", {}))
            seen.update(line.get("input", {}))
            if "block" in line:
                try:
                    self.block_entries(line["block"])
                except RunError as error:
                    raise ConfigurationError(
                        f"a block that was finished is lost ({error}); bring its file back or start anew with "
                        "--overwrite"
                    ) from error
                self._files[self._name(line["block"])] = line["file"]
                self.done.append(line["rows"])
        self._refuse([f"input ({part})" for part, digest in seen.items() if self._content(part) != digest])
        try:
            os.truncate(path, sum(length for _, length in found))
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror}; mend that and --resume") from error

    def _refuse(self, different: Sequence[str]) -> None:
        if different:
            raise ConfigurationError(
                f"{self.folder} was begun with another {' and another '.join(different)}; resume with the same, choose "
                "another --out, or start anew with --overwrite"
            )


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


def _tidy(out: Path, blocks: int) -> None:
    """Remove from a whole `out` what only its making needed."""
    for name in (*(_part_name(index) for index in range(blocks)), JOURNAL, LOCK):
        (out / name).unlink(missing_ok=True)
    if (out / REPLACED).exists():
        shutil.rmtree(out / REPLACED)
    sync_folder(out)


def _untidy(out: Path, error: OSError) -> str:
    return f"{out} is whole, but cannot be cleared of what its making needed: {error.strerror}; --resume tries again"


def _block(index: int) -> str:
    return f"block {index}"


def _part_name(index: int) -> str:
    """The file of a block that is not a shard of the result."""
    return f"block-{index:05d}.safetensors"


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    found = []
    for name in now:
        if json.loads(json.dumps(now[name])) != then.get(name):
            found.append(name + (_which(then, now) if name == "recipe" else ""))
    return found


def _parts(source: Checkpoint, blocks: Sequence[Sequence[str]]) -> dict[str, Sequence[str]]:
    """The input's tensors: those outside the blocks, and those of every block."""
    inside = {key for keys in blocks for key in keys}
    outside = [key for key in source.entries if key not in inside]
    return {_OUTSIDE: outside} | {_block(index): keys for index, keys in enumerate(blocks)}


def finished(
    out: Path, source: Checkpoint, blocks: Sequence[Sequence[str]], identity: Mapping[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """wanda.json of a folder that holds the whole result of this identity; removes what a kill may have left in it.

    Reads the input and the result. None when there is something to do: the folder is empty, or `overwrite` lets it be
    replaced. Raises ConfigurationError when it holds something else and must not be.
    """
    if not filled(out) or (overwrite and (partial_folder(out) / JOURNAL).exists()):
        return None
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        known = dict(report["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        known = report = {}
    what = "no result of wanda prune that is known"
    if known:
        different = _differences(known, identity)
        if not different:
            now = {name: source.content(keys) for name, keys in _parts(source, blocks).items()}
            different = [f"input ({name})" for name in now if now[name] != known.get("tensors", {}).get(name)]
        what = f"the result of another {' and another '.join(different)}"
        if not different:
            files = dict(known.get("files", {}))
            changed = [name for name in files if not (out / name).is_file() or file_digest(out / name) != files[name]]
            what = f"the result of this run, but {', '.join(changed)} changed since"
            if not changed:
                try:
                    _tidy(out, len(blocks))
                except OSError as error:
                    raise RunError(_untidy(out, error)) from error
                return dict(report)
    if overwrite:
        return None
    raise ConfigurationError(f"--out {out} is not empty; choose another folder or pass --overwrite (it holds {what})")
