"""Magnitude pruning over each whole layer (Han et al., arXiv:1506.02626; the baseline of arXiv:2306.11695)."""

from __future__ import annotations

from wanda.methods import METHODS, Method


@METHODS.register
class Magnitude(Method):
    """(magnitude, layer, none, uniform); needs no calibration."""

    score = "magnitude"
    group = "layer"
