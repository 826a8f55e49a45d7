"""Allocations: how much does each block give up? One allocation a file; the total is uniform's, exactly."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Protocol

from wanda.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from wanda.patterns import Pattern
    from wanda.statistics import Needs, Statistics

__path__ = pkgutil.extend_path(__path__, __name__)


@dataclass(frozen=True)
class BlockMeasure:
    """What an allocation measured of one dense block.

    value: the allocation's own figure of the block.
    weights: prunable weights in the block.
    """

    value: float
    weights: int


class Allocation(Protocol):
    """Shares the sparsity out among the blocks; `needs` NOTHING when no dense pass is wanted."""

    name: ClassVar[str]
    needs: ClassVar[Needs]
    measures: ClassVar[bool]  # wants measure() of every block before the first one is pruned

    def measure(self, matrices: Sequence[tuple[Tensor, Statistics]]) -> float:
        """A figure of one dense block: its matrices, [out, in] of any float type, each with its inputs' statistics."""
        ...

    def allocate(self, blocks: list[BlockMeasure], sparsity: Fraction) -> list[Fraction]:
        """The sparsity of every block, in [0, 1]; their mean over all weights is `sparsity`, exactly."""
        ...


ALLOCATIONS: Registry[Allocation] = Registry("allocation", __name__, __path__)


def places(blocks: Sequence[BlockMeasure]) -> list[float]:
    """Where every block's value lies between the lowest and the highest, 0 to 1; blocks with nothing to prune: 0."""
    values = [block.value for block in blocks if block.weights]
    low, reach = min(values, default=0.0), max(values, default=0.0) - min(values, default=0.0)
    return [(block.value - low) / reach if block.weights and reach > 0 else 0.0 for block in blocks]


def level(shares: Sequence[float], weights: Sequence[int], sparsity: Fraction) -> list[Fraction]:
    """Shift sparsities so that their mean over the weights is `sparsity`, exactly, and none leaves [0, 1].

    shares: a sparsity wanted for every block, whose differences count. weights: prunable weights of every block.
    """
    total = sum(weights)
    low, high = -1.0 - max(shares, default=0.0), 2.0 - min(shares, default=0.0)
    for _ in range(100):  # the clamped mean rises with the shift: bisect it
        shift = (low + high) / 2
        mean = sum(min(1.0, max(0.0, s + shift)) * w for s, w in zip(shares, weights, strict=True))
        low, high = (shift, high) if mean < sparsity * total else (low, shift)
    result = [Fraction(min(1.0, max(0.0, s + high))).limit_denominator(10**6) for s in shares]
    left = sparsity * total - sum((s * w for s, w in zip(result, weights, strict=True)), Fraction(0))
    for index, w in sorted(enumerate(weights), key=lambda pair: -pair[1]):  # rounding leaves next to nothing
        if w:
            moved = min(Fraction(1), max(Fraction(0), result[index] + left / w))
            left -= (moved - result[index]) * w
            result[index] = moved
    return result


def share_out(
    shapes: Sequence[Sequence[tuple[int, int]]], sparsities: Sequence[Fraction], pattern: Pattern
) -> list[list[Pattern]]:
    """The pattern of every matrix of every block, so that all together lose what they lose under `pattern` everywhere.

    shapes: (out, in) of the matrices of every block. sparsities: of every block, as allocate gives them. What rounding
    leaves goes round: each matrix gets a whole number of weights to lose, its groups differ by at most one.
    """
    from wanda.patterns import NM

    if all(s == pattern.sparsity for s in sparsities):
        return [[pattern] * len(block) for block in shapes]
    if isinstance(pattern, NM):
        raise ValueError("N:M cannot be shared out unevenly")
    total = sum(pattern.removed(out, width) for block in shapes for out, width in block)
    asked = sum(
        (s * out * width for s, block in zip(sparsities, shapes, strict=True) for out, width in block), Fraction(0)
    )
    scale = total / asked if asked else Fraction(0)
    patterns: list[list[Pattern]] = []
    running, given = Fraction(0), 0
    for s, block in zip(sparsities, shapes, strict=True):
        patterns.append([])
        for out, width in block:
            running += s * out * width * scale
            count = int(running) - given
            given += count
            patterns[-1].append(replace(pattern, sparsity=Fraction(count, out * width), spread=True))
    return patterns
