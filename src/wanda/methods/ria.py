"""RIA: relative importance and activations (Zhang et al., "Plug-and-Play", ICLR 2024)."""

from __future__ import annotations

from wanda.methods import METHODS, Method


@METHODS.register
class RIA(Method):
    """(ria, layer, none, uniform), the group that its repository takes."""

    score = "ria"
    group = "layer"
