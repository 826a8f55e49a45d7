"""Wanda: |W_ij| * ||X_j||_2 (Sun et al., "A Simple and Effective Pruning Approach", arXiv:2306.11695, eq. 1)."""

from __future__ import annotations

from wanda.scores import SCORES
from wanda.statistics import Needs


@SCORES.register
class Wanda:
    """Magnitude times the L2 norm of the input feature over all calibration tokens."""

    needs = Needs.NORMS
    by_row = True

    def prepare(self, weight, statistics):
        norm = statistics.input_norm()  # [in]
        return lambda columns_weight, columns: (columns_weight * norm[columns]).abs_()
