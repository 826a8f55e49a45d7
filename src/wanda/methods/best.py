"""Best: over-relaxed ADMM with a gradually chosen mask (arXiv:2401.02938), errors of earlier layers repaired."""

from __future__ import annotations

from wanda.methods import METHODS, Method


@METHODS.register
class Best(Method):
    """(the update owns the mask, row, admm-relaxed, uniform); target a third of the way to the dense model's inputs."""

    score = None
    update = "admm-relaxed"
    inherit = 0.35
