"""RIA: relative importance and activations (Zhang et al., "Plug-and-Play", ICLR 2024, eq. 3, with a = 1/2)."""

from __future__ import annotations

import torch

from wanda.scores import SCORES
from wanda.statistics import Needs


@SCORES.register
class RIA:
    """(|W| / column sum of |W| + |W| / row sum of |W|) * ||X_j||_2^0.5; the sums are the whole matrix's."""

    needs = Needs.NORMS
    by_row = False

    def prepare(self, weight, statistics):
        size = weight.abs()
        by_column, by_row = (torch.where(total > 0, 1 / total, 0) for total in (size.sum(dim=0), size.sum(dim=1)))
        root = statistics.input_norm().sqrt()  # [in]
        return lambda columns_weight, columns: (
            columns_weight.abs() * (by_column[columns] + by_row[:, None]) * root[columns]
        )
