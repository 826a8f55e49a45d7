"""Tensors of safetensors files, read one at a time with pread and written whole or not at all.

Reading maps nothing: mapped pages count as resident memory for as long as they are mapped, and the promise is
that no more than one block is in memory. The format is that of https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from wanda.errors import RunError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
_PIECE = 1 << 20  # bytes that are read, hashed and written at a time: they stay in the cache
_MOST = 2**63  # what torch counts elements in


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, type, shape, first byte from the start of the file, number of bytes."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, memory: SpareMemory | None = None) -> Tensor:
        """The tensor, in memory of its own or in that which is given; RunError when the file is cut short."""
        tensor = torch.empty(self.shape, dtype=self.dtype) if memory is None else memory.lend(self.shape, self.dtype)
        if self.nbytes:
            view, done = bytes_of(tensor), 0
            with self._opened() as descriptor:
                while done < self.nbytes:
                    got = os.preadv(descriptor, [view[done : done + (1 << 30)]], self.offset + done)
                    done += self._whole(got)
        return tensor

    def pieces(self) -> Iterator[bytes]:
        """The tensor's bytes, a few at a time; raises RunError when the file cannot be read to its end."""
        done = 0
        with self._opened() as descriptor:
            while done < self.nbytes:
                piece = os.pread(descriptor, min(self.nbytes - done, _PIECE), self.offset + done)
                done += self._whole(len(piece))
                yield piece

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self.file, os.O_RDONLY)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(
                f"{self.file}: {self.key} cannot be read ({error.strerror}); mend the file or copy it again"
            ) from error

    def _whole(self, got: int) -> int:
        if got == 0:
            raise RunError(f"{self.file} ends inside {self.key}; the file is cut short: copy it again")
        return got

    def read_ahead(self) -> None:
        """Have the system read the tensor from the disk into its page cache while this process goes on."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            with contextlib.suppress(OSError):  # read() will tell
                descriptor = os.open(self.file, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)


class SpareMemory:
    """Memory of tensors that nobody wants any more, to be read into again.

    The system fills fresh memory with zeros before it hands it out, which takes longer than reading a cached file.
    """

    def __init__(self) -> None:
        self._lent: list[Tensor] = []
        self._free: list[Tensor] = []

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any content, the caller's until it is taken back."""
        for place, tensor in enumerate(self._free):
            if tensor.shape == shape and tensor.dtype == dtype:
                self._lent.append(self._free.pop(place))
                return self._lent[-1]
        self._free.clear()  # this block is not like the one before: not both at once
        self._lent.append(torch.empty(shape, dtype=dtype))
        return self._lent[-1]

    def take_back(self) -> None:
        """All that is lent may be lent again, and so be overwritten; what nobody has asked for since is given up."""
        self._lent, self._free = [], self._lent

    def give_up(self) -> None:
        """Keep nothing, neither what is free nor what is lent."""
        self._lent, self._free = [], []


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of one safetensors file, every offset checked against the file's size.

    Raises RunError naming the file for anything that is not a whole safetensors file.
    """

    def corrupt(why: str) -> RunError:
        return RunError(f"{file} is not a whole safetensors file: {why}; copy or download it again")

    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            if len(first) < 8:
                raise corrupt("it is shorter than its header")
            length = int.from_bytes(first, "little")
            if length > min(size - 8, _HEADER_LIMIT):
                raise corrupt(f"its header claims {length} bytes of {size}")
            try:
                header = json.loads(stream.read(length))
            except (ValueError, RecursionError) as error:
                raise corrupt("its header is no JSON") from error
    except (OSError, ValueError) as error:  # a name with a null byte, or half a surrogate pair, is a ValueError
        why = getattr(error, "strerror", None) or error
        raise RunError(f"{str(file)!r} cannot be read ({why}); mend the file or copy it again") from error
    if not isinstance(header, dict):
        raise corrupt("its header is no table")
    metadata = header.pop("__metadata__", {}) or {}
    start = 8 + length
    entries: dict[str, Entry] = {}
    for key, value in header.items():
        try:
            dtype = DTYPES[value["dtype"]]
            shape = tuple(value["shape"])
            begin, end = value["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise corrupt(f"the entry of {key} is malformed or of an unknown type") from error
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise corrupt(f"the entry of {key} holds something else than counts")
        nbytes = math.prod(shape) * dtype.itemsize
        if end - begin != nbytes or start + end > size or math.prod(n or 1 for n in shape) * dtype.itemsize >= _MOST:
            raise corrupt(f"{key} does not fit the file")
        entries[key] = Entry(file, key, dtype, shape, start + begin, nbytes)
    return entries, metadata


def write_file(path: Path, tensors: Mapping[str, Tensor | Entry], metadata: Mapping[str, str], align: int = 8) -> str:
    """Write a safetensors file under a temporary name, flush it to the disk, rename it; returns `file_digest` of it.

    Tensors are laid out in the order of the mapping; an Entry is copied from its file in pieces, never whole in memory.
    Raises RunError when the disk is full or cannot be written, or an Entry's file cannot be read; nothing is left under
    `path` then.
    """
    return stage_file(path, tensors, metadata, align)()


def stage_file(
    path: Path, tensors: Mapping[str, Tensor | Entry], metadata: Mapping[str, str], align: int = 8
) -> Callable[[], str]:
    """The first half of `write_file`: all is written under the temporary name, and the tensors are free to go.

    Returns the second half, to be called once: flushes to the disk, renames, returns the digest.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, tensor in tensors.items():
        nbytes = tensor.nbytes
        header[key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % align)
    temporary = path.with_name(path.name + ".tmp")

    @contextlib.contextmanager
    def closing_on_error() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
            with contextlib.suppress(OSError):
                temporary.unlink()
            if not isinstance(error, OSError):
                raise
            raise RunError(
                f"{path} cannot be written: {error.strerror}; free some space or choose another --out"
            ) from error

    stream: BinaryIO | None = None
    digest = xxhash.xxh3_128()
    with closing_on_error():
        stream = open(temporary, "wb")  # noqa: SIM115
        for piece in itertools.chain([len(head).to_bytes(8, "little") + head], *map(_pieces, tensors.values())):
            stream.write(piece)
            digest.update(piece)
        stream.flush()

    def commit() -> str:
        assert stream is not None
        with closing_on_error():
            os.fsync(stream.fileno())
            stream.close()
            os.replace(temporary, path)
            sync_folder(path.parent)
        return digest.hexdigest()

    return commit


def file_pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, a few at a time; raises RunError when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            while piece := stream.read(_PIECE):
                yield piece
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); mend the file or copy it again") from error


def file_digest(path: Path) -> str:
    """XXH3 (128 bits) of a file's bytes; raises RunError when it cannot be read."""
    digest = xxhash.xxh3_128()
    for piece in file_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in its own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Make everything inside `folder`, at any depth, last through a power cut."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(Path(place) / name, "rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(place))


def _pieces(tensor: Tensor | Entry) -> Iterator[memoryview | bytes]:
    if isinstance(tensor, Entry):
        yield from tensor.pieces()
    elif tensor.nbytes:
        whole = bytes_of(tensor.detach().cpu().contiguous())
        for first in range(0, len(whole), _PIECE):
            yield whole[first : first + _PIECE]
