"""A composition: score, pattern and update at work on one matrix. Here the axes meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from wanda.allocation import ALLOCATIONS
from wanda.errors import ConfigurationError, RunError, near
from wanda.kernels.columns import square_sum
from wanda.methods import METHODS
from wanda.patterns import NM, Pattern, Variant, exact, group_named
from wanda.scores import SCORES
from wanda.statistics import Needs, Statistics
from wanda.updates import UPDATES, Problem

_PANEL = 1 << 19  # weights: what is made of so many on the way stays in the cache, in memory that is used again


@dataclass(frozen=True)
class OutputError:
    """||(W - B) X^T||^2 and ||W X^T||^2 over the calibration inputs X, of dense weights W and pruned B.

    exact: taken with a Gram matrix; else with the input norms only, as if the features were uncorrelated.
    """

    lost: float
    whole: float
    exact: bool

    @property
    def relative(self) -> float:
        """Squared output error over squared dense output."""
        return self.lost / self.whole if self.whole > 0 else 0.0

    def __add__(self, other: OutputError) -> OutputError:
        """The error of some rows and of others together."""
        return OutputError(self.lost + other.lost, self.whole + other.whole, self.exact and other.exact)


@dataclass
class Pruned:
    """What became of one matrix, or of some of its rows.

    weight: [out, in] float32, zero where mask is False.
    mask: [out, in] bool, True survives.
    error: what the outputs lost on the calibration inputs; None without statistics.
    notes: sentences for the report.
    """

    weight: Tensor
    mask: Tensor
    error: OutputError | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Composition:
    """How to prune a matrix: a score's name (None when the update owns its mask) and a chain of updates `a+b`.

    inherit: share a of the dense model's inputs in the target of the Gram-based updates.
    """

    score: str | None
    update: str = "none"
    inherit: float = 0.0

    @property
    def needs(self) -> Needs:
        """What calibration has to accumulate."""
        needs = [UPDATES.get(name).needs for name in self.update.split("+")]
        return max(needs + ([SCORES.get(self.score).needs] if self.score else []))

    @property
    def factor_memory(self) -> int:
        """Matrices of the Gram matrix's size, beside it, that are alive at once while a factor is made of it."""
        parts: list[Any] = [UPDATES.get(name) for name in self.update.split("+")]
        parts += [SCORES.get(self.score)] if self.score else []
        return max(getattr(part, "factor_memory", 4) if part.needs == Needs.GRAM else 0 for part in parts)

    def weight_memory(self, pattern: Pattern) -> int:
        """Bytes a weight that are alive at once while a matrix, or a panel of it, is pruned: a float32 copy of it too.

        Figures as measured, rounded up; factors of Gram matrices are not in them.
        """
        links = [getattr(UPDATES.get(name), "weight_memory", (80, 80)) for name in self.update.split("+")]
        most = max(by_row if pattern.by_row else whole for by_row, whole in links)
        if isinstance(pattern, Variant):
            most = max(most, 42)  # sorted scores, their places and sums
        if self.score is not None and SCORES.get(self.score).needs == Needs.GRAM:
            most = max(most, 24)
        return 4 + most

    def panels(self, pattern: Pattern, out: int, width: int) -> list[slice]:
        """Slices of the rows of an [out, width] matrix whose pruning, one by one, gives what the whole matrix's gives.

        Small ones where score, pattern and update look at every row by itself; else one of all rows.
        """
        by_row = self.score is not None and getattr(SCORES.get(self.score), "by_row", False)
        alone = by_row and self.update == "none" and pattern.by_row
        rows = max(1, _PANEL // max(1, width)) if alone else max(1, out)
        return [slice(first, min(first + rows, out)) for first in range(0, max(1, out), rows)]

    def prune(
        self,
        weight: Tensor,
        statistics: Statistics,
        pattern: Pattern,
        name: str,
    ) -> Pruned:
        """Prune the matrix called `name` (for messages), or a panel of it; weight: [out, in] float32, never written to.

        Raises RunError when scores or updated weights are not finite.
        """
        select = self._select(weight, statistics, pattern, name)
        problem = Problem(weight, statistics, pattern, select, self.inherit)
        if self.inherit and statistics.lag is None:
            problem.inherit = 0.0
            problem.notes.append("the dense model has no input that goes with this one: inherited errors not repaired")
        for update in self.update.split("+"):
            problem.solution, problem.mask = UPDATES.get(update)(problem)
        assert problem.solution is not None and problem.mask is not None
        if not finite(problem.solution):
            cure = "use more samples" if finite(weight) else "the input holds NaN or Inf weights there: mend it"
            raise RunError(f"{name}: the update {self.update} gave values that are not finite; {cure}")
        error = output_error(weight, problem.solution, statistics)
        return Pruned(problem.solution, problem.mask, error, statistics.notes + problem.notes)

    def _select(
        self, weight: Tensor, statistics: Statistics, pattern: Pattern, name: str
    ) -> Callable[[Tensor, slice], Tensor]:
        if self.score is None:

            def refuse(columns_weight: Tensor, columns: slice) -> Tensor:
                raise RunError(f"{name}: the update {self.update} asked for a mask though no score was named")

            return refuse
        scorer = SCORES.get(self.score).prepare(weight, statistics)
        width = weight.shape[1]

        def select(columns_weight: Tensor, columns: slice) -> Tensor:
            scores = scorer(columns_weight, columns)
            if not finite(scores):
                raise RunError(f"{name}: the {self.score} scores are not finite; the weights or activations overflowed")
            return pattern.mask(scores, columns.start or 0, width)

        return select


def finite(values: Tensor) -> bool:
    """Whether all values are finite; their sum tells nearly always, at a tenth of the price of looking at each."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def output_error(dense: Tensor, pruned: Tensor, statistics: Statistics) -> OutputError | None:
    """What the outputs lose on the calibration inputs; None when there were none."""
    if statistics.square_sum is None or statistics.tokens == 0:
        return None
    difference = dense - pruned
    if statistics.gram is not None:
        lost = (difference @ statistics.gram).mul_(difference).sum(dtype=torch.float64)
        whole = (dense @ statistics.gram).mul_(dense).sum(dtype=torch.float64)
    else:
        lost = square_sum(difference).double() @ statistics.square_sum.double()
        whole = square_sum(dense).double() @ statistics.square_sum.double()
    return OutputError(float(lost), float(whole), statistics.gram is not None)


def faults(
    *,
    method: str | None = None,
    score: str | None = None,
    update: str | None = None,
    group: str | None = None,
    variant: bool = False,
    pattern: str | None = None,
    sparsity: float | str | Fraction | None = None,
    allocation: str | None = None,
    inherit: float | None = None,
) -> list[str]:
    """Everything about these choices that makes no sense, one sentence each; None is the method's own choice.

    method: a method's name; without one, score magnitude, group row, update none, allocation uniform.
    pattern: N:M as text, or None for unstructured. Nothing is loaded but the modules of the choices.
    """
    found: list[str] = []

    def known(registry: Any, name: str) -> bool:
        if name in registry:
            return True
        found.append(f"unknown {registry.kind} {name!r}: {near(name, registry.names())}")
        return False

    base = METHODS.get(method) if method is not None and known(METHODS, method) else None
    chain = (update if update is not None else base.update if base else "none").split("+")
    links = [UPDATES.get(name) if known(UPDATES, name) else None for name in chain]
    found += _chain_faults(links)
    owner = next((link.name for link in links if link is not None and link.owns_mask), None)
    if score is not None and known(SCORES, score) and owner is not None:
        found.append(f"the update {owner} chooses its mask itself, so the score {score} would be ignored: leave it out")
    if score is None and owner is None and base is not None and base.score is None and None not in links:
        found.append(f"the update {'+'.join(chain)} needs a score, and the method {method} has none: name a score")

    pruned_group = _parsed(group_named, group if group is not None else base.group if base else "row", found)
    nm = _parsed(NM.parse, pattern, found) if pattern is not None else None
    if pattern is not None:
        if group is not None:
            found.append(f"with the pattern {pattern} the M inputs compete: the group {group} would be ignored")
        if variant:
            found.append(
                f"the variant gives rows different counts, the pattern {pattern} fixes them: choose one of them"
            )
    elif variant:
        if group not in (None, "row"):
            found.append(f"the variant is made of rows: it cannot have the group {group}")
        pruned_group = "row"
    for link in links:
        if link is not None and link.within_rows and pattern is None and pruned_group not in ("row", "layer", None):
            found.append(
                f"the update {link.name} moves weights within a row, which breaks the counts of the group"
                f" {group or (base.group if base else 'row')}: use row, layer or N:M"
            )
    found += _sparsity_faults(sparsity, nm)

    share = allocation if allocation is not None else base.allocation if base else "uniform"
    if known(ALLOCATIONS, share) and share != "uniform" and pattern is not None:
        found.append(f"the allocation {share} cannot vary the pattern {pattern}: use uniform, or a sparsity")
    a = inherit if inherit is not None else base.inherit if base else 0.0
    if not 0 <= a <= 1:
        found.append(f"inherit {a:g} is not a share from 0 to 1")
    elif inherit and None not in links and not any(link is not None and link.solves for link in links):
        solving = ", ".join(name for name in UPDATES.names() if UPDATES.get(name).solves)
        found.append(f"inherited errors are repaired by an update, {'+'.join(chain)} solves nothing: use {solving}")
    return found


def _parsed(parse: Callable[[str], Any], text: str, found: list[str]) -> Any:
    try:
        return parse(text)
    except ConfigurationError as error:
        found += error.faults
        return None


def _chain_faults(links: list[Any]) -> list[str]:
    """A first link chooses the mask, every later one keeps the mask it is handed; none is for nothing."""
    chained = [name for name in UPDATES.names() if UPDATES.get(name).takes_chain]
    lost = [
        f"the update {link.name} starts at the dense weights again, so that {before.name} before it, which keeps the"
        " mask, would be for nothing: leave it out, or put it last"
        for before, link in itertools.pairwise(links)
        if link is not None and before is not None and getattr(link, "restarts", False) and before.takes_chain
    ]
    return lost + [
        f"the update {link.name} chooses a mask anew and cannot come after {before.name if before else 'another'}"
        f": put it first; {', '.join(chained)} can follow"
        for before, link in itertools.pairwise(links)
        if link is not None and not link.takes_chain
    ]


def _sparsity_faults(sparsity: float | str | Fraction | None, nm: NM | None) -> list[str]:
    if sparsity is None:
        return []
    try:
        wanted = exact(sparsity)
    except (ValueError, ZeroDivisionError):
        return [f"sparsity {sparsity!r} is no number"]
    if not 0 <= wanted < 1:
        return [f"sparsity {sparsity} is not in [0, 1): it is the share of weights to remove"]
    if nm is not None and wanted != nm.sparsity:
        share = float(nm.sparsity)
        return [f"the pattern {nm.text} removes {share:g} of the weights and cannot reach {sparsity}: leave one out"]
    return []
