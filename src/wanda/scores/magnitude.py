"""Magnitude: |W| (Han et al., "Learning both Weights and Connections", arXiv:1506.02626)."""

from __future__ import annotations

from wanda.scores import SCORES
from wanda.statistics import Needs


@SCORES.register
class Magnitude:
    """The absolute value of the weight; needs no calibration."""

    needs = Needs.NOTHING
    by_row = True

    def prepare(self, weight, statistics):
        return lambda columns_weight, columns: columns_weight.abs()
