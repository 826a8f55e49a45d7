"""Methods: named points of the grid score x group x update x allocation, one a file, the paper on top."""

from __future__ import annotations

import pkgutil
from typing import ClassVar

from wanda.registry import Registry

__path__ = pkgutil.extend_path(__path__, __name__)


class Method:
    """Base of all methods, to be subclassed with the axes that differ; a recipe may override every axis by name.

    score: a score's name, or None when the update owns its mask.
    group: row, layer, column or block:K (ignored with N:M, where the M inputs compete).
    update: an update's name or a chain `a+b`.
    allocation: an allocation's name.
    inherit: share a of the dense model's inputs in the target of Gram-based updates; 0 needs no second stream.
    """

    name: ClassVar[str]
    score: str | None = "magnitude"
    group: str = "row"
    update: str = "none"
    allocation: str = "uniform"
    inherit: float = 0.0


METHODS: Registry[Method] = Registry("method", __name__, __path__)
