"""Allocations: how much does each block give up? One allocation a file; the total is uniform's, exactly."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Protocol

from wanda.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from wanda.statistics import Needs, Statistics

__path__ = pkgutil.extend_path(__path__, __name__)


@dataclass(frozen=True)
class BlockMeasure:
    """What an allocation measured of one dense block.

    value: the allocation's own figure of the block (mean over its matrices, weighted by their sizes).
    weights: prunable weights in the block.
    """

    value: float
    weights: int


class Allocation(Protocol):
    """Shares the sparsity out among the blocks; `needs` NOTHING when no dense pass is wanted."""

    name: ClassVar[str]
    needs: ClassVar[Needs]
    measures: ClassVar[bool]  # wants measure() of every matrix before the first block is pruned

    def measure(self, weight: Tensor, statistics: Statistics) -> float:
        """A figure of one dense matrix, weight [out, in] float32."""
        ...

    def allocate(self, blocks: list[BlockMeasure], sparsity: Fraction) -> list[Fraction]:
        """The sparsity of every block."""
        ...


ALLOCATIONS: Registry[Allocation] = Registry("allocation", __name__, __path__)
