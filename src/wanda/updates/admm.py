"""ADMM under a fixed mask (Boza, "Fast and Effective Weight Update for Pruned LLMs", arXiv:2401.02938)."""

from __future__ import annotations

from torch import Tensor

from wanda.statistics import Needs
from wanda.updates import UPDATES, Problem
from wanda.updates._admm import admm


@UPDATES.register
class ADMM:
    """Refit the survivors of any mask (the chain's, else the score's) by 20 steps of ADMM from the dense weights."""

    needs = Needs.GRAM
    owns_mask = False
    takes_chain = True
    solves = True
    within_rows = False
    factor_memory = 3
    weight_memory = (28, 28)
    restarts = True

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]:
        mask = problem.select(problem.weight, slice(None)) if problem.mask is None else problem.mask
        return admm(problem, lambda step, total, rows: mask[rows] if step == 0 else None, by_row=True)
