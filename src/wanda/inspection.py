"""Inspecting a checkpoint: sparsity of every matrix, N:M, dead rows and columns, sizes; a matrix at a time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.skeleton import Skeleton
from wanda.patterns import NM
from wanda.weights import find_matrices

_COMMON = (NM(1, 4), NM(2, 4), NM(4, 8))


@dataclass(frozen=True)
class MatrixInspection:
    """One matrix: shape [out, in], share of zeros, N:M patterns that every group obeys, all-zero rows and columns."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    patterns: tuple[str, ...]
    dead_rows: int
    dead_columns: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint: its matrices, its size on disk, the zeros of the whole model."""

    model: str
    matrices: tuple[MatrixInspection, ...]
    file_bytes: int
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros in the matrices of the blocks."""
        total = sum(m.shape[0] * m.shape[1] for m in self.matrices)
        return sum(m.sparsity * m.shape[0] * m.shape[1] for m in self.matrices) / max(1, total)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.model,
            "sparsity": self.sparsity,
            "model_zeros_share": self.zeros / max(1, self.weights),
            "model_weights": self.weights,
            "file_bytes": self.file_bytes,
            "layers": [dataclasses.asdict(matrix) for matrix in self.matrices],
        }


def inspect(folder: Path, patterns: list[NM] | None = None, trust_remote_code: bool = False) -> Inspection:
    """Inspect a resolved checkpoint folder, a block in memory at a time.

    patterns: N:M patterns to check; 1:4, 2:4 and 4:8 when None. A pattern counts as obeyed when no group of M inputs
    has more than N non-zeros. Raises ConfigurationError for what is no checkpoint of a decoder.
    """
    checkpoint = Checkpoint.open(folder)
    skeleton = Skeleton(checkpoint, torch.float32, torch.device("cpu"), trust_remote_code)
    found: list[MatrixInspection] = []
    zeros = 0
    inside: set[str] = set()
    for index, block in enumerate(skeleton.blocks.modules):
        matrices = [
            m for m in find_matrices(block, skeleton.blocks.prefix(index))[0] if skeleton.blocks.prunable(m.name)
        ]
        inside.update(skeleton.block_keys(index))
        tensors = {}
        for group in skeleton.block_groups(index):
            tensors.update(skeleton.names.load(group))
        zeros += sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in tensors.values())
        for matrix in matrices:
            survives = matrix.view(tensors[matrix.parameter]) != 0
            if matrix.router and bool(survives.all()):
                continue
            found.append(
                MatrixInspection(
                    matrix.name,
                    (matrix.out, matrix.width),
                    1 - int(survives.sum()) / matrix.numel,
                    tuple(p.text for p in patterns or _COMMON if p.obeyed(survives)),
                    int((~survives.any(dim=1)).sum()),
                    int((~survives.any(dim=0)).sum()),
                )
            )
    for key, entry in checkpoint.entries.items():
        if key not in inside:
            tensor = entry.read()
            zeros += tensor.numel() - int(tensor.count_nonzero())
    sizes = {entry.file: entry.file.stat().st_size for entry in checkpoint.entries.values()}
    weights = sum(torch.Size(entry.shape).numel() for entry in checkpoint.entries.values())
    return Inspection(str(folder), tuple(found), sum(sizes.values()), weights, zeros)
