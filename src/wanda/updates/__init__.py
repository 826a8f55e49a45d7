"""Weight updates: what do the survivors do about what was removed? One update a file; `a+b` runs b on a's result."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from wanda.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from wanda.patterns import Pattern
    from wanda.statistics import Needs, Statistics

__path__ = pkgutil.extend_path(__path__, __name__)


@dataclass
class Problem:
    """One matrix to prune: what an update is given, and what the one before it in a chain left.

    weight: [out, in] float32, the dense matrix W; never written to.
    statistics: of the matrix's inputs X.
    pattern: which weights compete and how many survive.
    select: (current weights [out, k] of some columns, those columns) -> bool mask [out, k], True survives.
    inherit: a in [0, 1]; the target is W (a X_dense + (1 - a) X)^T, X_dense the dense model's inputs.
    solution, mask: what the chain has so far, [out, in] float32 and bool; None for its first update.
    notes: sentences for the report (damping raised, say).
    """

    weight: Tensor
    statistics: Statistics
    pattern: Pattern
    select: Callable[[Tensor, slice], Tensor]
    inherit: float = 0.0
    solution: Tensor | None = None
    mask: Tensor | None = None
    notes: list[str] = field(default_factory=list)


class Update(Protocol):
    """Solves a Problem: returns (weights [out, in] float32, mask [out, in] bool); weights are zero where mask is False."""

    name: ClassVar[str]
    needs: ClassVar[Needs]
    owns_mask: ClassVar[bool]  # chooses the mask itself: a score named beside it is refused
    takes_chain: ClassVar[bool]  # may follow another update (`swap+pcg`)

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]: ...


UPDATES: Registry[Update] = Registry("update", __name__, __path__)
