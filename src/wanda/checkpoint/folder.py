"""A folder to write into: what is refused, and how it is built beside its place and renamed, to be whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TextIO

from wanda.checkpoint.tensors import sync_files, sync_folder
from wanda.errors import ConfigurationError, RunError

JOURNAL = "journal.jsonl"
TUNE_IDENTITY = "tune.json"
_RUNS = {JOURNAL: "prune", TUNE_IDENTITY: "tune"}  # the file that a stopped run left, and whose run it is
LOCK = "lock"
REPORT = "wanda.json"
REPLACED = "replaced"  # an earlier DIR, inside the new one until it can go
RESULT = "result"  # where tune puts together what becomes DIR
INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def followed(out: Path) -> Path:
    """`out` absolute; where it is a link, the folder that it links to, so that the link stays."""
    return out.resolve() if out.is_symlink() else out.absolute()


def output_faults(
    out: Path, inputs: Sequence[Path], overwrite: bool, resume: bool, command: Literal["prune", "tune"] = "prune"
) -> list[str]:
    """Why `out` cannot be written, one sentence each; writes nothing.

    inputs: files and folders that are read, which must not be lost. resume: go on with a stopped run of `command`; what
    else lies in `out`.partial is somebody's work, which only `overwrite` gives up. A result that `finished` may know
    passes with `resume` of prune.
    """
    faults = []
    partial = partial_folder(out)
    taken = next((fault for path in inputs if path.exists() and (fault := _input_fault(out, partial, path))), None)
    if taken is not None:
        faults.append(taken)
    elif out.exists() and not out.is_dir():
        faults.append(f"--out {out} is a file; choose a folder")
    elif os.path.ismount(out):
        faults.append(f"--out {out} is where a disk is mounted, which cannot be replaced; choose a folder inside it")
    elif filled(out) and not overwrite and not (resume and command == "prune" and (out / REPORT).is_file()):
        faults.append(f"--out {out} is not empty; choose another folder or pass --overwrite")
    existing = nearest_folder(out)
    if existing.is_dir() and not os.access(existing if existing != out.absolute() else existing.parent, os.W_OK):
        faults.append(f"--out {out} cannot be made: {existing} is not writable; choose another folder")
    elif not existing.is_dir() and existing != out.absolute():
        faults.append(f"--out {out} cannot be made: {existing} is a file; choose another folder")
    found = [owner for file, owner in _RUNS.items() if (partial / file).exists()]
    for owner in found:
        if not overwrite and not (resume and command == owner):
            faults.append(
                f"{partial} holds an unfinished run of wanda {owner}; go on with it by its --resume, start anew with "
                "--overwrite, or choose another --out"
            )
    if partial.exists() and not partial.is_dir():
        faults.append(f"{partial}, where --out would be built, is a file; remove it, or choose another --out")
    elif not found and not overwrite and partial.exists() and _others(partial):
        earlier = f" and holds the {out} that a killed run was to replace" if (partial / REPLACED).exists() else ""
        faults.append(
            f"{partial}, where --out would be built, exists already{earlier}; move it away, choose another --out, or "
            "pass --overwrite, which builds there anew"
        )
    return faults


def _input_fault(out: Path, partial: Path, path: Path) -> str | None:
    path = path.resolve()
    if out.resolve() == path:
        return f"--out {out} is the input itself, which is never written to; choose another folder"
    if out.resolve() in path.parents:
        return f"--out {out} holds the input {path}, which is never written to; choose another folder"
    if partial.resolve() in (path, *path.parents):
        return f"--out {out} would be built in {partial}, where the input is; choose another folder"
    return None


def _others(partial: Path) -> bool:
    """Whether a folder holds anything but what a run leaves that was killed before it began."""
    return any(file.name != LOCK for file in partial.iterdir())


def filled(out: Path) -> bool:
    """Whether there is anything in a folder."""
    return out.is_dir() and any(out.iterdir())


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def partial_folder(out: Path) -> Path:
    """Where `out` is built before it is renamed."""
    return out.absolute().with_name(out.absolute().name + ".partial")


@contextlib.contextmanager
def new_folder(out: Path, inputs: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out`, flushed, when the body is through, and goes when it fails.

    Raises ConfigurationError for what `output_faults` finds, RunError when it cannot be written.
    """
    out = followed(out)
    faults = output_faults(out, inputs, overwrite, resume=False)
    if faults:
        raise ConfigurationError(faults)
    partial = partial_folder(out)
    try:
        with locked(partial, out):
            if filled(out) and not overwrite:  # since it was looked at
                raise ConfigurationError(f"another run has written {out} meanwhile; choose another --out")
            empty_folder(partial, out)
            try:
                yield partial
                (partial / LOCK).unlink()
                sync_files(partial)
                replace_folder(partial, out)
            except BaseException:
                if not (partial / REPLACED).exists():  # an earlier `out` that cannot be put back
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}; free some space or choose another --out") from error


def replace_folder(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; an earlier `out` waits inside until that is done, then it is removed.

    A kill between the two renames leaves both in `partial`, one after them both in `out`; an error puts it back.
    """
    aside = partial / REPLACED
    try:
        if out.exists():
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(out, aside)
            sync_folder(out.parent)
        os.replace(partial, out)
    except BaseException:
        with contextlib.suppress(OSError):
            put_back(partial, out)
        raise
    sync_folder(out.parent)
    if (out / REPLACED).exists():
        shutil.rmtree(out / REPLACED)


def put_back(partial: Path, out: Path) -> None:
    """Rename an earlier `out` that waits in `partial` to its place, where that is free."""
    if (partial / REPLACED).exists() and not out.exists():
        os.replace(partial / REPLACED, out)


def empty_folder(partial: Path, out: Path) -> None:
    """Remove all but the lock, what says that there is a run first; raises RunError where that cannot be done.

    An earlier `out` that a killed run has moved there comes back before.
    """
    try:
        for place in (partial, partial / RESULT):
            put_back(place, out)
        for name in _RUNS:
            (partial / name).unlink(missing_ok=True)
        sync_folder(partial)
        for file in partial.iterdir():
            if file.is_dir() and not file.is_symlink():  # a stopped run of tune has folders
                shutil.rmtree(file)
            elif file.name != LOCK:
                file.unlink()
    except OSError as error:
        raise RunError(f"{partial} cannot be emptied: {error.strerror}; remove it") from error


def locked(partial: Path, out: Path) -> TextIO:
    """Make `partial` and hold it against a second run: the open lock file.

    The run that had it may rename or remove it while this one waits to look at it. Raises ConfigurationError when
    another run has it, RunError when it cannot be made.
    """
    gone: FileNotFoundError | None = None
    for _ in range(100):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            sync_folder(partial.parent)
            lock = open(partial / LOCK, "a", encoding="ascii")  # noqa: SIM115
        except FileNotFoundError as error:
            gone = error
            continue
        except OSError as error:
            raise RunError(f"{partial} cannot be made: {error.strerror}; choose another --out") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), (partial / LOCK).stat()):
                return lock
        except BlockingIOError:
            lock.close()
            gone = None
            break
        except FileNotFoundError:
            pass
        except OSError as error:
            lock.close()
            raise RunError(
                f"{partial} cannot be locked: {error.strerror}; choose an --out on a disk that has locks"
            ) from error
        lock.close()
    if gone is not None:
        raise RunError(f"{partial} cannot be made: {gone.strerror}; choose another --out") from gone
    raise ConfigurationError(f"another run is writing {out}; wait for it or choose another --out")


def replace_file(file: Path, text: str) -> None:
    """Write `text` to `file`, whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)
