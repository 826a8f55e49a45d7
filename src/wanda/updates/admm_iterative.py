"""ADMM with a gradually chosen mask (Boza, "Fast and Effective Weight Update for Pruned LLMs", arXiv:2401.02938)."""

from __future__ import annotations

from torch import Tensor

from wanda.statistics import Needs
from wanda.updates import UPDATES, Problem
from wanda.updates._admm import admm, rising


@UPDATES.register
class IterativeADMM:
    """Reselect the mask on |V + U|, weights scaled by their inputs' norms, as the sparsity rises for 15 of 20 steps."""

    needs = Needs.GRAM
    owns_mask = True
    takes_chain = False
    solves = True
    within_rows = False
    factor_memory = 3
    weight_memory = (28, 80)
    rises = 15  # steps over which the sparsity rises
    relaxation = 1.0
    reduced = False

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]:
        pattern = problem.pattern
        return admm(problem, rising(pattern, self.rises), pattern.by_row, self.relaxation, self.reduced)
