"""Best: ADMM with a gradually chosen mask, then conjugate gradients, errors of earlier layers repaired."""

from __future__ import annotations

from wanda.methods import METHODS, Method


@METHODS.register
class Best(Method):
    """(the update owns the mask, row, admm-iterative+pcg, uniform); target half way to the dense model's inputs."""

    score = None
    update = "admm-iterative+pcg"
    inherit = 0.5
