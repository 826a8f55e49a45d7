"""None: the survivors keep their values (Wanda, arXiv:2306.11695; magnitude)."""

from __future__ import annotations

import torch

from wanda.kernels.selection import clear_lost
from wanda.statistics import Needs
from wanda.updates import UPDATES, Problem


@UPDATES.register
class NoUpdate:
    """Select once over all columns; survivors stay bit-identical."""

    needs = Needs.NOTHING
    owns_mask = False
    takes_chain = False
    solves = False
    within_rows = False
    factor_memory = 0
    weight_memory = (12, 12)

    def __call__(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        mask = problem.select(problem.weight, slice(None))
        return clear_lost(problem.weight.clone(), mask), mask
