"""The packed checkpoint (docs/packed-format.md): sparse matrices as survivors, mask and offsets; the rest as it was.

A packed folder holds wanda_packed.json, which says what it is and lists every tensor's type, shape and checksum, the
safetensors files that it names, and the other files of the original. Reading maps the files; nothing is trusted before
it is verified.
"""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

from wanda.checkpoint.folder import INDEX, WEIGHTS, new_folder
from wanda.checkpoint.packed_planes import join_planes, require_zstd, split_planes
from wanda.checkpoint.source import read_config, resolve, weight_files
from wanda.checkpoint.tensors import DTYPES, NAMES, Entry, read_header, write_file
from wanda.errors import ConfigurationError, RunError
from wanda.kernels.packed import (
    ALIGNMENT,
    KINDS,
    MOST_SURVIVORS,
    PackedMatrix,
    count_survivors,
    packed_size,
    part_lengths,
)

T = TypeVar("T")

MANIFEST = "wanda_packed.json"
FORMAT, VERSION = "wanda-packed", 1
WORTH = 0.9  # of its dense size is the most that a packed matrix may take; above that it stays dense
SHARD = 1 << 31  # bytes of tensors in a file, about
_PARTS = {"mask": torch.uint64, "offsets": torch.uint32}
_STORED = {False: ("mask", "offsets", "values"), True: ("mask", "offsets", "exponents", "rest")}
_PIECE = 1 << 24


@dataclass
class Summary:
    """What packing did, in bytes.

    packed: matrices packed, their dense and packed bytes; dense: 2-D matrices with some zeros for which it did not pay.
    folder_before, folder_after: all tensors. left_out: files of the input that were not taken over.
    """

    packed: int = 0
    dense_bytes: int = 0
    packed_bytes: int = 0
    left_dense: list[str] = field(default_factory=list)
    folder_before: int = 0
    folder_after: int = 0
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PackedCheckpoint:
    """A verified packed folder: names of its safetensors files, matrices (by the name they had), other tensors, dense.

    Tensors lie in the mapped files, so they take memory as they are touched; writing to one changes only this process's
    copy. Those of a compressed folder were decompressed into memory.
    """

    folder: Path
    files: frozenset[str]
    matrices: dict[str, PackedMatrix]
    tensors: dict[str, Tensor]


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """XXH3-64 of the manifest without its own checksum, as compact JSON in ASCII with sorted keys."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def is_packed(folder: Path) -> bool:
    """Whether a folder says of itself that it is a packed checkpoint."""
    return (folder / MANIFEST).is_file()


def stored_dtypes(folder: Path) -> set[torch.dtype]:
    """The types of a packed folder's matrices, as its manifest has them; nothing else is read.

    Raises ConfigurationError and RunError as `open_packed` does for the manifest.
    """
    named = (item.get("dtype") for item in _read_manifest(folder)["matrices"].values() if isinstance(item, dict))
    return {DTYPES[name] for name in named if isinstance(name, str) and name in DTYPES}


def pack(
    model: str,
    out: Path,
    compress: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Summary:
    """Pack the checkpoint `model` (folder, hub id or .gguf file) into the folder `out`; lossless.

    Every 2-D matrix of bfloat16, float16 or float32 that comes out at WORTH of its size or less is packed.
    compress: zstd on exponents and masks, for shipping. progress: called with each tensor's name.
    Raises ConfigurationError before anything is written, RunError when reading or writing fails on the way.
    """
    if compress:
        require_zstd()
    if is_packed(Path(model)):
        raise ConfigurationError(f"{model} is packed already; unpack it first to pack it in another way")
    source = resolve(model)
    lacking = _lacking_code(source)
    if lacking:
        raise ConfigurationError(
            f"{source}: its config.json names code of its own ({', '.join(lacking)}) that the folder lacks, so what is "
            "packed could not be loaded; download the whole model with its code (hf download) and pack that"
        )
    entries: dict[str, Entry] = {}
    for file in weight_files(source):
        entries.update(read_header(file)[0])
    summary = Summary(folder_before=sum(entry.nbytes for entry in entries.values()))
    with new_folder(out, [Path(model), source], overwrite) as partial:
        writer = _ShardWriter(partial, entries)
        for key, entry in entries.items():
            if progress:
                progress(key)
            matrix = _pack_if_worth(key, entry, summary)
            writer.add({key: entry} if matrix is None else _parts(key, matrix, compress))
            if matrix is not None:
                out_width = [matrix.out, matrix.width]
                writer.matrices[key] = {
                    "dtype": NAMES[matrix.dtype],
                    "shape": out_width,
                    "survivors": matrix.survivors,
                }
        writer.flush()
        summary.folder_after = writer.nbytes
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "compressed": compress,
            "files": writer.files,
            "matrices": writer.matrices,
            "tensors": writer.tensors,
        }
        manifest["checksum"] = manifest_checksum(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        summary.left_out = _copy_others(source, partial, {file.name for file in weight_files(source)})
    return summary


def unpack(
    folder: Path, out: Path, overwrite: bool = False, progress: Callable[[str], None] | None = None
) -> tuple[int, list[str]]:
    """Write a packed folder as an ordinary checkpoint with bit-identical tensors.

    Returns the bytes of all tensors, and the names of files and folders in `folder` that were not taken over.
    Raises ConfigurationError when the folder is not packed or `out` is taken, RunError for a file that is damaged.
    """
    checkpoint = open_packed(folder)
    names = [*checkpoint.matrices, *checkpoint.tensors]
    sizes = {key: _dense_size(m) for key, m in checkpoint.matrices.items()}
    sizes.update({key: tensor.nbytes for key, tensor in checkpoint.tensors.items()})
    shards: list[list[str]] = [[]]
    filled = 0
    for key in names:
        if filled + sizes[key] > SHARD and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += sizes[key]
    with new_folder(out, [folder], overwrite) as partial:
        weight_map = {}
        for number, keys in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {}
            for key in keys:
                if progress:
                    progress(key)
                tensors[key] = (
                    checkpoint.matrices[key].dense() if key in checkpoint.matrices else checkpoint.tensors[key]
                )
                weight_map[key] = name
            write_file(partial / name, _by_alignment(tensors), {"format": "pt"})
        total = sum(sizes.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        left_out = _copy_others(folder, partial, checkpoint.files)
    return total, left_out


def open_packed(folder: Path) -> PackedCheckpoint:
    """Map a packed folder and verify it: every checksum, and that no kernel can leave a matrix's bounds.

    Raises ConfigurationError for a folder that is not packed, or by a later version; RunError, naming the tensor, for
    one that is damaged.
    """
    manifest = _read_manifest(folder)
    entries: dict[str, Entry] = {}
    for name in manifest["files"]:
        if not isinstance(name, str) or Path(name).name != name:
            raise RunError(f"{folder / MANIFEST} names a file {name!r} outside its folder; get the folder again")
        found, metadata = read_header(folder / name)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or entries.keys() & found.keys():
            raise RunError(f"{folder / name} does not belong to this packed folder; copy or download it again")
        entries.update(found)
    bytes_of = _map(entries)
    descriptions, listed, compressed = manifest["matrices"], manifest["tensors"], manifest["compressed"]
    for key in bytes_of.keys() ^ listed.keys():
        what = "is listed but is in none of the files" if key in listed else "is not listed"
        raise RunError(f"{folder}: {key} {what}; copy or download the folder again")
    for key, entry in entries.items():
        said = listed[key]
        if not isinstance(said, dict) or (said.get("dtype"), said.get("shape")) != _type_of(entry):
            raise RunError(f"{folder}: {key} is not of the type and shape that are listed; copy or download it again")
        if entry.offset % entry.dtype.itemsize:
            raise RunError(f"{folder}: {key} does not start at a multiple of its elements; copy or download it again")

    tensors = {key: _view(bytes_of[key], entry.dtype, entry.shape) for key, entry in entries.items()}
    parts = {key: [f"{key}.{name}" for name in _STORED[compressed]] for key in descriptions}
    alone = tensors.keys() - {part for names in parts.values() for part in names}

    for key in alone & descriptions.keys():
        raise RunError(f"{folder}: {key} is there twice, packed and dense; copy or download the folder again")

    def verify_bytes(key: str) -> None:
        if xxhash.xxh3_64_hexdigest(bytes_of[key]) != listed[key].get("checksum"):
            raise RunError(f"{folder}: {key} is damaged: its checksum differs; copy or download it again")

    def take(key: str) -> PackedMatrix | None:
        """Bytes and structure of a matrix in one go, while its mask is in cache; a tensor of its own has only bytes."""
        if key in alone:
            verify_bytes(key)
            return None
        with _naming(folder, key):
            for part in parts[key]:
                if part in bytes_of:
                    verify_bytes(part)
            return _matrix(key, descriptions[key], tensors, compressed)

    taken = _in_threads(take, [*alone, *descriptions])
    return PackedCheckpoint(
        folder,
        frozenset(manifest["files"]),
        {key: matrix for key in descriptions if (matrix := taken[key]) is not None},
        {key: tensors[key] for key in entries if key in alone},
    )


@contextmanager
def _naming(folder: Path, key: str) -> Iterator[None]:
    """Turn what is wrong with one matrix into an error that names it."""
    try:
        yield
    except MemoryError as error:
        raise RunError(f"{folder}: {key} needs more memory than there is") from error
    except _DamagedError as error:
        raise RunError(f"{folder}: {key} is damaged: {error}; copy or download it again") from error


class _DamagedError(Exception):
    """Why a matrix cannot be used."""


def _lacking_code(source: Path) -> list[str]:
    """Files of modelling code that config.json names (auto_map: "file.Class") and the folder has not."""
    code = read_config(source).get("auto_map")
    found = [name for value in (code.values() if isinstance(code, dict) else ()) for name in _listed(value)]
    here = [name for name in found if "--" not in name]  # "repository--file.Class" is fetched from there
    files = {f"{name.partition('.')[0]}.py" for name in here}
    return sorted(file for file in files if not (source / file).is_file())


def _listed(value: Any) -> list[str]:
    """The strings of an entry of auto_map, which is one or a list (of which some are null)."""
    return [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]


def _pack_if_worth(key: str, entry: Entry, summary: Summary) -> PackedMatrix | None:
    if len(entry.shape) != 2 or entry.dtype not in KINDS or entry.nbytes == 0:
        return None
    dense = entry.read()
    survivors = count_survivors(dense)
    size = packed_size(*entry.shape, survivors, entry.dtype)
    if size > WORTH * entry.nbytes or survivors > MOST_SURVIVORS:
        if survivors < 0.99 * dense.numel():
            summary.left_dense.append(key)
        return None
    summary.packed += 1
    summary.dense_bytes += entry.nbytes
    matrix = PackedMatrix.pack(dense)
    summary.packed_bytes += matrix.nbytes
    return matrix


def _parts(key: str, matrix: PackedMatrix, compress: bool) -> dict[str, Tensor | Entry]:
    parts: dict[str, Tensor | Entry] = {"mask": matrix.mask, "offsets": matrix.offsets, "values": matrix.values}
    if compress:
        parts = {"offsets": matrix.offsets, **split_planes(matrix.mask, matrix.values)}
    return {f"{key}.{name}": parts[name] for name in _STORED[compress]}


class _ShardWriter:
    """Gathers tensors and writes them into numbered files of about SHARD bytes, with their checksums."""

    def __init__(self, folder: Path, taken: Iterable[str]):
        self.folder, self.taken = folder, set(taken)
        self.files: list[str] = []
        self.matrices: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, dict[str, Any]] = {}
        self.nbytes = 0
        self._waiting: dict[str, Tensor | Entry] = {}
        self._filled = 0

    def add(self, tensors: Mapping[str, Tensor | Entry]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._waiting and self._filled + size > SHARD:
            self.flush()
        for key, tensor in tensors.items():
            if isinstance(tensor, Tensor) and key in self.taken:
                raise RunError(f"the checkpoint has a tensor {key} already, so that packing is ambiguous; rename it")
            dtype, shape = _type_of(tensor)
            self.tensors[key] = {"dtype": dtype, "shape": shape, "checksum": _checksum(_pieces(tensor))}
        self._waiting.update(tensors)
        self._filled += size

    def flush(self) -> None:
        if not self._waiting:
            return
        self.files.append(f"packed-{len(self.files) + 1:05d}.safetensors")
        metadata = {"format": FORMAT, "version": str(VERSION)}
        write_file(self.folder / self.files[-1], _by_alignment(self._waiting), metadata, align=ALIGNMENT)
        self.nbytes += self._filled
        self._waiting, self._filled = {}, 0


def _by_alignment(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors in an order in which each starts at a multiple of its element, parts of matrices at one of ALIGNMENT."""

    def rank(key: str) -> tuple[bool, int]:
        whole = tensors[key].nbytes % ALIGNMENT == 0
        return not whole, -tensors[key].dtype.itemsize

    return {key: tensors[key] for key in sorted(tensors, key=rank)}


def _type_of(tensor: Tensor | Entry) -> tuple[str, list[int]]:
    """Type and shape as safetensors writes them."""
    return NAMES[tensor.dtype], list(tensor.shape)


def _pieces(tensor: Tensor | Entry) -> Iterator[memoryview]:
    if isinstance(tensor, Entry) and tensor.nbytes > _PIECE:
        with open(tensor.file, "rb") as stream:
            stream.seek(tensor.offset)
            for start in range(0, tensor.nbytes, _PIECE):
                yield memoryview(stream.read(min(_PIECE, tensor.nbytes - start)))
        return
    whole = tensor.read() if isinstance(tensor, Entry) else tensor
    yield whole.reshape(-1).view(torch.uint8).numpy().data


def _checksum(pieces: Iterable[memoryview]) -> str:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _copy_others(source: Path, target: Path, taken: Set[str]) -> list[str]:
    """Copy the files that are neither weights nor the manifest; returns the names of what is left out.

    taken: the weight files whose tensors were written anew.
    """
    left_out = []
    for file in sorted(source.iterdir()):
        if file.name in (MANIFEST, INDEX) or file.name in taken:
            continue
        if not file.is_file() or file.name.endswith(WEIGHTS):
            left_out.append(file.name)
        else:
            shutil.copyfile(file, target / file.name)
    return left_out


def _dense_size(matrix: PackedMatrix) -> int:
    return matrix.out * matrix.width * matrix.dtype.itemsize


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise ConfigurationError(f"{folder} is no packed checkpoint: it has no {MANIFEST}; make one with wanda pack")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} cannot be read ({type(error).__name__}); copy or download it again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RunError(f"{file} does not describe a packed checkpoint; copy or download it again")
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ConfigurationError(
            f"{folder} is in version {version} of the packed format, this program reads up to {VERSION}; "
            "upgrade wanda-prune"
        )
    types = {"version": int, "compressed": bool, "files": list, "matrices": dict, "tensors": dict}
    for name, kind in types.items():
        if not isinstance(manifest.get(name), kind):
            raise RunError(f"{file}: its entry {name} is missing or no {kind.__name__}; copy or download it again")
    if type(version) is not int or version < 1:
        raise RunError(f"{file}: there is no version {version} of the packed format; copy or download it again")
    try:
        whole = manifest.get("checksum") == manifest_checksum(manifest)
    except RecursionError:
        whole = False
    if not whole:
        raise RunError(f"{file} is damaged: its checksum differs; copy or download it again")
    return manifest


def _map(entries: Mapping[str, Entry]) -> dict[str, memoryview]:
    """Each tensor's bytes in a private mapping of its file."""
    maps: dict[Path, memoryview] = {}
    bytes_of = {}
    for key, entry in entries.items():
        if entry.file not in maps:
            try:
                with open(entry.file, "rb") as stream:
                    mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise RunError(f"{entry.file} cannot be mapped ({error}); copy or download it again") from error
            maps[entry.file] = memoryview(mapping)
        bytes_of[key] = maps[entry.file][entry.offset : entry.offset + entry.nbytes]
        if len(bytes_of[key]) != entry.nbytes:
            raise RunError(f"{entry.file} ends inside {key}; the file is cut short: copy it again")
    return bytes_of


def _in_threads(work: Callable[[str], T], keys: Iterable[str]) -> dict[str, T]:
    """The results of work by key; as many threads as torch uses take one key after another.

    Checksums and structure are checked at the speed of memory, and without Python's lock.
    """
    left = iter(list(keys))
    results: dict[str, T] = {}

    def run(_: int) -> None:
        for key in left:  # shared: a list's iterator hands each key to one thread
            results[key] = work(key)

    count = torch.get_num_threads()
    with ThreadPoolExecutor(count) as threads:
        for _ in threads.map(run, range(count)):
            pass
    return results


def _view(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _matrix(key: str, description: Any, tensors: dict[str, Tensor], compressed: bool) -> PackedMatrix:
    """Take one matrix's parts out of `tensors`; raises _DamagedError when they do not fit together."""
    try:
        dtype = DTYPES[description["dtype"]]
        out, width = description["shape"]
        survivors = description["survivors"]
    except (KeyError, TypeError, ValueError) as error:
        raise _DamagedError("its description is malformed") from error
    if dtype not in KINDS or not all(type(n) is int for n in (out, width, survivors)):
        raise _DamagedError("its description is malformed")
    if min(out, width) < 1 or not 0 <= survivors <= min(out * width, MOST_SURVIVORS):
        raise _DamagedError(f"it cannot have {survivors} survivors of {out} x {width} weights")
    lengths = part_lengths(out, width, survivors, dtype)
    stored = _STORED[compressed]
    try:
        parts = {name: tensors.pop(f"{key}.{name}") for name in stored}
    except KeyError as error:
        raise _DamagedError(f"its part {error} is missing") from error
    if compressed:
        try:
            parts.update(join_planes(parts, lengths["mask"], lengths["values"], dtype))
        except ValueError as error:
            raise _DamagedError(str(error)) from error
    for name, kind in {**_PARTS, "values": dtype}.items():
        part = parts[name]
        if part.dtype != kind or part.shape != (lengths[name],) or part.data_ptr() % kind.itemsize:
            raise _DamagedError(f"its {name} are {tuple(part.shape)} of {part.dtype}, not ({lengths[name]},) of {kind}")
    matrix = PackedMatrix(out, width, parts["mask"], parts["offsets"], parts["values"])
    fault = matrix.fault()
    if fault is not None or matrix.survivors != survivors:
        raise _DamagedError(fault or f"it has {matrix.survivors} values, not {survivors}")
    return matrix
