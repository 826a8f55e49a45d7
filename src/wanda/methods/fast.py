"""Fast: over-relaxed ADMM with a gradually chosen mask (arXiv:2401.02938); one pass."""

from __future__ import annotations

from wanda.methods import METHODS, Method


@METHODS.register
class Fast(Method):
    """(the update owns the mask, row, admm-relaxed, uniform) without a second stream."""

    score = None
    update = "admm-relaxed"
