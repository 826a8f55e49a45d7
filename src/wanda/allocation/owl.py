"""OWL: blocks with more outliers among their Wanda scores keep more (Yin et al., arXiv:2310.05175)."""

from __future__ import annotations

from fractions import Fraction

from wanda.allocation import ALLOCATIONS, BlockMeasure, level
from wanda.statistics import Needs

OUTLIER = 5.0  # M: times the mean of a block's scores
SPREAD = 0.08  # lambda: keep ratios reach from mean - lambda to mean + lambda


@ALLOCATIONS.register
class OWL:
    """D = 100 * share of a block's Wanda scores above 5 times their mean; keep ratios grow linearly with D."""

    needs = Needs.NORMS
    measures = True

    def measure(self, matrices) -> float:
        scores = [weight.float().abs() * statistics.input_norm() for weight, statistics in matrices]
        count = sum(score.numel() for score in scores)
        mean = sum(float(score.sum()) for score in scores) / count
        return 100 * sum(int((score > OUTLIER * mean).sum()) for score in scores) / count

    def allocate(self, blocks: list[BlockMeasure], sparsity: Fraction) -> list[Fraction]:
        values = [block.value for block in blocks]
        low, reach = min(values), max(values) - min(values)
        keep = [(value - low) / reach * 2 * SPREAD if reach > 0 else 0.0 for value in values]
        return level([-k for k in keep], [block.weights for block in blocks], sparsity)
