"""A composition: score, pattern and update at work on one matrix. Here the axes meet."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from wanda.errors import RunError
from wanda.patterns import Pattern
from wanda.scores import SCORES
from wanda.statistics import Needs, Statistics
from wanda.updates import UPDATES, Problem


@dataclass
class Pruned:
    """What became of one matrix.

    weight: [out, in] float32, zero where mask is False.
    mask: [out, in] bool, True survives.
    relative_error: squared output error over squared dense output on the calibration inputs; None without statistics.
    exact_error: True when taken with a Gram matrix, False for the diagonal estimate with input norms.
    notes: sentences for the report.
    """

    weight: Tensor
    mask: Tensor
    relative_error: float | None
    exact_error: bool
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Composition:
    """How to prune a matrix: a score's name (None when the update owns its mask) and a chain of updates `a+b`."""

    score: str | None
    update: str = "none"
    inherit: float = 0.0

    @property
    def needs(self) -> Needs:
        """What calibration has to accumulate."""
        needs = [UPDATES.get(name).needs for name in self.update.split("+")]
        return max(needs + ([SCORES.get(self.score).needs] if self.score else []))

    def prune(self, weight: Tensor, statistics: Statistics, pattern: Pattern, name: str) -> Pruned:
        """Prune the matrix called `name` (for messages); weight: [out, in] float32, never written to.

        Raises RunError when scores or updated weights are not finite.
        """
        problem = Problem(weight, statistics, pattern, self._select(weight, statistics, pattern, name), self.inherit)
        for update in self.update.split("+"):
            problem.solution, problem.mask = UPDATES.get(update)(problem)
        assert problem.solution is not None and problem.mask is not None
        if not bool(torch.isfinite(problem.solution).all()):
            raise RunError(
                f"{name}: the update {self.update} gave values that are not finite; try more damping samples"
            )
        error, exact = relative_error(weight, problem.solution, statistics)
        return Pruned(problem.solution, problem.mask, error, exact, problem.notes)

    def _select(self, weight: Tensor, statistics: Statistics, pattern: Pattern, name: str):
        if self.score is None:

            def refuse(columns_weight: Tensor, columns: slice) -> Tensor:
                raise RunError(f"{name}: the update {self.update} asked for a mask though it owns it")

            return refuse
        scorer = SCORES.get(self.score).prepare(weight, statistics)

        def select(columns_weight: Tensor, columns: slice) -> Tensor:
            scores = scorer(columns_weight, columns)
            if not bool(torch.isfinite(scores).all()):
                raise RunError(f"{name}: the {self.score} scores are not finite; the weights or activations overflowed")
            return pattern.mask(scores)

        return select


def relative_error(dense: Tensor, pruned: Tensor, statistics: Statistics) -> tuple[float | None, bool]:
    """||(W - B) X^T||^2 / ||W X^T||^2, exact with a Gram matrix, else from the input norms (features uncorrelated)."""
    if statistics.square_sum is None or statistics.tokens == 0:
        return None, False
    difference = dense - pruned
    if statistics.gram is not None:
        lost = (difference @ statistics.gram).mul_(difference).sum(dtype=torch.float64)
        whole = (dense @ statistics.gram).mul_(dense).sum(dtype=torch.float64)
    else:
        lost = (difference.square_() @ statistics.square_sum).sum(dtype=torch.float64)
        whole = (dense.square() @ statistics.square_sum).sum(dtype=torch.float64)
    return (float(lost / whole) if whole > 0 else 0.0), statistics.gram is not None
