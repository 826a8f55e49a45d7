"""Alpha: blocks with heavier tails in their weight spectra keep more; no data (AlphaPruning, arXiv:2410.10912)."""

from __future__ import annotations

from fractions import Fraction

import torch

from wanda.allocation import ALLOCATIONS, BlockMeasure, level, places
from wanda.statistics import Needs

SPREAD = 0.3  # tau: before levelling, sparsities reach from (1 - tau) s to (1 + tau) s


@ALLOCATIONS.register
class Alpha:
    """Hill's estimate of the exponent of the spectrum's upper half, averaged over a block's matrices."""

    needs = Needs.NOTHING
    measures = True

    def measure(self, matrices) -> float:
        return sum(exponent(weight.float()) for weight, _ in matrices) / len(matrices)

    def allocate(self, blocks: list[BlockMeasure], sparsity: Fraction) -> list[Fraction]:
        shares = [float(sparsity) * (1 - SPREAD + 2 * SPREAD * place) for place in places(blocks)]
        return level(shares, [block.weights for block in blocks], sparsity)


def exponent(weight: torch.Tensor) -> float:
    """1 + k / sum of ln(l_i / l_k+1) over the k largest eigenvalues of W^T W, k half of them (eq. 2); W: [out, in]."""
    small = weight if weight.shape[0] <= weight.shape[1] else weight.T
    eigenvalues = torch.linalg.eigvalsh(small @ small.T).clamp_min(1e-30)  # ascending
    k = eigenvalues.numel() // 2
    tail = (eigenvalues[-k:] / eigenvalues[-k - 1]).log().sum() if k else torch.zeros(())
    return 1 + k / max(float(tail), 1e-6)  # a flat spectrum has no tail: a large exponent
