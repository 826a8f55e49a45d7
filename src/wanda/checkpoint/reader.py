"""The tensors of a checkpoint folder: headers at once, tensors when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from wanda.checkpoint.source import weight_files
from wanda.checkpoint.tensors import Entry, read_header
from wanda.errors import ConfigurationError, RunError


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files in Hugging Face's layout: where each tensor lies."""

    folder: Path
    entries: dict[str, Entry]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of all shards; reads no weights.

        Raises ConfigurationError for a folder without safetensors, a missing shard, a file that is cut short.
        """
        entries: dict[str, Entry] = {}
        faults: list[str] = []
        for file in weight_files(folder):
            try:
                entries.update(read_header(file)[0])
            except RunError as error:
                faults.append(str(error))
        if faults:
            raise ConfigurationError(faults)
        return cls(folder, entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def structure(self) -> str:
        """A digest of the config and of every tensor's name, type and shape, wherever it lies; reads no weights."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for key, entry in sorted(self.entries.items()):
            digest.update(f"{key} {entry.dtype} {entry.shape}\n".encode())
        return digest.hexdigest()

    def content(self, keys: Iterable[str]) -> str:
        """XXH3 (128 bits) of the bytes of some tensors, by their names; about as fast as they can be read.

        A file that was copied, mended or laid out anew counts as what it holds, not as when it was written.
        Raises RunError for a file that cannot be read.
        """
        digest = xxhash.xxh3_128()
        for key in sorted(keys):
            digest.update(f"{key} ".encode())
            for piece in self.entries[key].pieces():
                digest.update(piece)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """A digest of config and all tensors, to tell another input from this one; reads everything."""
        return hashlib.sha256(f"{self.structure()} {self.content(self.entries)}".encode()).hexdigest()
