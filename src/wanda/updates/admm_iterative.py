"""ADMM with a gradually chosen mask (Boza, "Fast and Effective Weight Update for Pruned LLMs", arXiv:2401.02938)."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from wanda.statistics import Needs
from wanda.updates import UPDATES, Problem
from wanda.updates._admm import admm

STEPS = 15  # steps over which the sparsity rises to its aim, cubically (Zhu, Gupta, arXiv:1710.01878)


@UPDATES.register
class IterativeADMM:
    """Reselect the mask on |V + U|, weights scaled by their inputs' norms, as the sparsity rises."""

    needs = Needs.GRAM
    owns_mask = True
    takes_chain = False
    solves = True
    within_rows = False

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]:
        pattern = problem.pattern

        def choose(step: int, total: Tensor, rows: slice) -> Tensor | None:
            if step >= STEPS:
                return None
            return pattern.at(pattern.sparsity * (1 - (1 - Fraction(step + 1, STEPS)) ** 3)).mask(total.abs())

        return admm(problem, choose, by_row=pattern.by_row)
