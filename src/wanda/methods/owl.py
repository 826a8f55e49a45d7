"""OWL: Wanda with outlier-weighed layerwise sparsity (Yin et al., arXiv:2310.05175)."""

from __future__ import annotations

from wanda.methods import METHODS, Method


@METHODS.register
class OWL(Method):
    """(wanda, row, none, owl)."""

    score = "wanda"
    allocation = "owl"
