"""Uniform: every block gives up the same share."""

from __future__ import annotations

from fractions import Fraction

from wanda.allocation import ALLOCATIONS, BlockMeasure
from wanda.statistics import Needs


@ALLOCATIONS.register
class Uniform:
    """The same sparsity everywhere."""

    needs = Needs.NOTHING
    measures = False

    def measure(self, matrices) -> float:
        return 0.0

    def allocate(self, blocks: list[BlockMeasure], sparsity: Fraction) -> list[Fraction]:
        return [sparsity] * len(blocks)
