"""OBS: w^2 / u_jj^2, u the upper Cholesky factor of the inverse Hessian (SparseGPT, arXiv:2301.00774, eq. 5)."""

from __future__ import annotations

import torch

from wanda.factors import dead_inputs, inverse_factor
from wanda.scores import SCORES
from wanda.statistics import Needs


@SCORES.register
class OBS:
    """The error that removing the weight leaves when the later columns make up for it; 0 at dead inputs."""

    needs = Needs.GRAM
    factor_memory = 4
    by_row = False

    def prepare(self, weight, statistics):
        diagonal = inverse_factor(statistics).diagonal()
        scale = torch.where(dead_inputs(statistics), 0, diagonal.reciprocal())  # [in]
        return lambda columns_weight, columns: (columns_weight * scale[columns]).square_()
