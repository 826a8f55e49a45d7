"""The hidden states between two blocks, one tensor a micro-batch: in memory, or in a file when memory is short."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wanda.checkpoint.tensors import bytes_of
from wanda.errors import RunError


class Activations:
    """A list of tensors, kept on the host; with `folder`, in an unnamed file there.

    The file is read and written with pread and pwrite, since mapped pages would count as resident memory.
    """

    def __init__(self, tensors: Sequence[Tensor], folder: Path | None = None):
        self._file = tempfile.TemporaryFile(dir=folder) if folder is not None else None  # noqa: SIM115
        self._folder = folder
        self._kept: list[Tensor] = []
        self._like: list[tuple[torch.Size, torch.dtype]] = []
        self._slots: list[tuple[int, int]] = []  # in the file: first byte, bytes
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor) -> None:
        """One more micro-batch's, which goes to the file at once where there is one."""
        self._like.append((tensor.shape, tensor.dtype))
        self._slots.append((max(map(sum, self._slots), default=0), tensor.nbytes))
        self._kept.append(tensor if self._file is None else torch.empty(0))
        self[len(self) - 1] = tensor

    def __len__(self) -> int:
        return len(self._like)

    def __getitem__(self, index: int) -> Tensor:
        if self._file is None:
            return self._kept[index]
        shape, dtype = self._like[index]
        tensor = torch.empty(shape, dtype=dtype)
        view = bytes_of(tensor)
        if os.preadv(self._file.fileno(), [view], self._slots[index][0]) != tensor.nbytes:
            raise RunError("the file of activations is cut short; is its disk full?")
        return tensor

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        shape, dtype = self._like[index]
        if (tensor.shape[:1], tensor.dtype) != (shape[:1], dtype):  # another width is a stage's of an image classifier
            raise RunError(f"a block turned hidden states {self._like[index]} into {(tensor.shape, tensor.dtype)}")
        self._like[index] = (tensor.shape, dtype)
        if self._file is None:
            self._kept[index] = tensor.cpu()
            return
        if tensor.nbytes > self._slots[index][1]:
            self._slots[index] = (max(map(sum, self._slots)), tensor.nbytes)
        start = self._slots[index][0]
        view, done = bytes_of(tensor.cpu().contiguous()), 0
        try:
            while done < tensor.nbytes:
                done += os.pwritev(self._file.fileno(), [view[done:]], start + done)
        except OSError as error:
            raise RunError(
                f"activations cannot be written: {error.strerror}; free some space in {self._folder}"
            ) from error

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Give back the file; the activations are gone."""
        if self._file is not None:
            self._file.close()

    def copy(self) -> Activations:
        """Independent activations with the same values."""
        twin = Activations.__new__(Activations)
        twin.__dict__.update(self.__dict__)
        twin._like, twin._slots = list(self._like), list(self._slots)
        if self._file is None:
            twin._kept = list(self._kept)  # tensors are replaced, never written to
        else:
            twin._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            for index in range(len(self)):
                twin[index] = self[index]
        return twin
