"""Weight updates: what do the survivors do about what was removed? One update a file; `a+b` runs b on a's result."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from wanda.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from wanda.patterns import Pattern
    from wanda.statistics import Needs, Statistics

PANEL_WEIGHTS = 2**18  # 1 MiB of float32 for each of the few tensors of a panel of rows, so that they stay in the cache
PANEL_ROWS = 256  # at least, or the products are slow

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

    def beyond(self) -> Tensor | None:
        """What the right-hand side has beyond W G: a W lag, [out, in]; None when it has nothing.

        An updated B minimises tr((B - W) G (B - W)^T) - 2 tr((B - W) beyond^T), the squared error to the target.
        """
        if self.inherit == 0:
            return None
        if self.statistics.lag is None:
            raise ValueError("inherited errors were asked for, but the statistics have no lag")
        return (self.weight @ self.statistics.lag).mul_(self.inherit)

    def row_panels(self, by_row: bool = True) -> Iterator[slice]:
        """Slices of rows small enough that their work stays in the cache; all rows at once unless `by_row`."""
        out, width = self.weight.shape
        step = max(PANEL_ROWS, PANEL_WEIGHTS // width) if by_row else out
        return (slice(start, min(start + step, out)) for start in range(0, out, step))


class Update(Protocol):
    """Solves a Problem: returns (weights float32, mask bool), both [out, in]; weights are zero where mask is False.

    May be left out: restarts (starts at the dense weights again and takes only the mask of what is before it in a
    chain; False), factor_memory (matrices of the Gram matrix's size that are alive at once while a factor is made of
    it; 4), weight_memory (bytes a weight that are alive at once beside the matrix, for patterns that look at every row
    by itself and for others; 80 for both).
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    owns_mask: ClassVar[bool]  # chooses the mask itself: a score named beside it is refused
    takes_chain: ClassVar[bool]  # may follow another update (`swap+pcg`): keeps the mask it is handed
    solves: ClassVar[bool]  # refits the survivors to a right-hand side: knows `inherit`
    within_rows: ClassVar[bool]  # needs rows whose counts stand by themselves: no column or block groups

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]: ...


UPDATES: Registry[Update] = Registry("update", __name__, __path__)
