"""OBS sweep, iterative: the mask is chosen on updated weights (SparseGPT, Frantar, Alistarh, arXiv:2301.00774).

Unstructured patterns choose over 128 columns at a time (or a multiple of the group's columns), N:M at each M-th column.
"""

from __future__ import annotations

from torch import Tensor

from wanda.patterns import NM
from wanda.statistics import Needs
from wanda.updates import UPDATES, Problem
from wanda.updates._sweep import sweep

WIDTH = 128  # the paper's mask block


@UPDATES.register
class IterativeSweep:
    """Select the mask of a slice when the errors of all earlier columns have arrived there, then sweep the slice."""

    needs = Needs.GRAM
    owns_mask = False
    takes_chain = False
    solves = True
    within_rows = False
    factor_memory = 4
    weight_memory = (36, 36)

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]:
        pattern, width = problem.pattern, problem.weight.shape[1]
        step = pattern.step if isinstance(pattern, NM) else pattern.step * max(1, WIDTH // pattern.step)
        slices = [slice(start, min(start + step, width)) for start in range(0, width, step)]
        return sweep(problem, slices, problem.select)
