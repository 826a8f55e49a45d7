"""OWL: blocks with more outliers among their Wanda scores keep more (Yin et al., arXiv:2310.05175)."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from wanda.allocation import ALLOCATIONS, BlockMeasure, level, places
from wanda.statistics import Needs, Statistics

OUTLIER = 5.0  # M: times the mean of a block's scores
SPREAD = 0.08  # lambda: keep ratios reach from mean - lambda to mean + lambda


@ALLOCATIONS.register
class OWL:
    """D = 100 * share of a block's Wanda scores above 5 times their mean; keep ratios grow linearly with D."""

    needs = Needs.NORMS
    measures = True

    def measure(self, matrices) -> float:
        count = sum(weight.numel() for weight, _ in matrices)
        mean = sum(float(wanda(*matrix).sum()) for matrix in matrices) / count
        return 100 * sum(int((wanda(*matrix) > OUTLIER * mean).sum()) for matrix in matrices) / count

    def allocate(self, blocks: list[BlockMeasure], sparsity: Fraction) -> list[Fraction]:
        return level([-2 * SPREAD * place for place in places(blocks)], [block.weights for block in blocks], sparsity)


def wanda(weight: Tensor, statistics: Statistics) -> Tensor:
    """|W| * ||X_j||: [out, in] float32."""
    return weight.float().abs() * statistics.input_norm()
