"""Matrices with inputs as models have them, correlated and of uneven norms: for the tests of the axes."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from wanda.patterns import NM, Unstructured, Variant
from wanda.statistics import Needs, Statistics

PATTERNS = {
    "row": Unstructured(Fraction(1, 2)),
    "row of 0.29": Unstructured(Fraction(29, 100)),
    "layer": Unstructured(Fraction(3, 5), "layer"),
    "column": Unstructured(Fraction(1, 2), "column"),
    "block": Unstructured(Fraction(1, 2), 32),
    "spread": Unstructured(Fraction(4567, 10000), "row", spread=True),
    "2:4": NM(2, 4),
    "1:4": NM(1, 4),
    "5:8": NM(5, 8),
    "variant": Variant(Fraction(1, 2)),
}


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """[tokens, width] float32, features correlated through a shared low-rank part."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(2, width // 4)
    low = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, width, generator=generator) / rank**0.5
    noise = torch.randn(tokens, width, generator=generator)
    return (low + 0.5 * noise) * torch.rand(width, generator=generator).mul(2).exp()


def weights(out: int, width: int, seed: int = 1) -> Tensor:
    """[out, width] float32."""
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def gathered(x: Tensor, dense: Tensor | None = None, needs: Needs = Needs.GRAM) -> Statistics:
    """The statistics of x [tokens, in], with the lag behind `dense` when given."""
    statistics = Statistics(x.shape[1], needs, inherit=dense is not None)
    statistics.update(x, dense)
    return statistics
