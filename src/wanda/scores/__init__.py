"""Scores: how much does each weight matter? One score a file; higher survives."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol

from wanda.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from wanda.statistics import Needs, Statistics

__path__ = pkgutil.extend_path(__path__, __name__)  # a file in another folder on the path is a choice too


class Score(Protocol):
    """How much each weight of a matrix matters.

    by_row: a row's scores come from that row and the statistics alone, so that rows can be scored a few at a time, in
        less memory; may be left out, which is False. factor_memory: as an update's, for one that needs Gram matrices.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    by_row: ClassVar[bool]

    def prepare(self, weight: Tensor, statistics: Statistics) -> Callable[[Tensor, slice], Tensor]:
        """Take whole-matrix quantities once; weight: [out, in] float32.

        Returns a function of (current weights [out, k] of some columns, those columns) to scores [out, k] >= 0.
        """
        ...


SCORES: Registry[Score] = Registry("score", __name__, __path__)
