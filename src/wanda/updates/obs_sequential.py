"""OBS sweep, sequential: SparseGPT's update under a mask fixed before it (arXiv:2301.00774; arXiv:2306.11695, 5)."""

from __future__ import annotations

from torch import Tensor

from wanda.statistics import Needs
from wanda.updates import UPDATES, Problem
from wanda.updates._sweep import sweep


@UPDATES.register
class SequentialSweep:
    """Select once over all columns (or take the chain's mask), then sweep the dense weights under it."""

    needs = Needs.GRAM
    owns_mask = False
    takes_chain = True
    solves = True
    within_rows = False
    factor_memory = 4
    weight_memory = (36, 36)
    restarts = True

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]:
        mask = problem.select(problem.weight, slice(None)) if problem.mask is None else problem.mask
        width = mask.shape[1]
        return sweep(problem, [slice(0, width)], lambda weights, columns: mask[:, columns])
