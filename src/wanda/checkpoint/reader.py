"""The tensors of a checkpoint folder: headers at once, tensors when they are asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

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

    def fingerprint(self) -> str:
        """A digest of the config, all headers and each file's size and time, to tell another input from this one."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted({entry.file for entry in self.entries.values()}):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for key, entry in sorted(self.entries.items()):
            digest.update(f"{key} {entry.dtype} {entry.shape} {entry.offset}\n".encode())
        return digest.hexdigest()
