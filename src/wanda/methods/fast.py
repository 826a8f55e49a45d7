"""Fast: ADMM with a gradually chosen mask (arXiv:2401.02938), then conjugate gradients (arXiv:2406.07831); one pass."""

from __future__ import annotations

from wanda.methods import METHODS, Method


@METHODS.register
class Fast(Method):
    """(the update owns the mask, row, admm-iterative+pcg, uniform) without a second stream."""

    score = None
    update = "admm-iterative+pcg"
    inherit = 0.0
