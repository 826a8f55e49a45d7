"""SparseGPT: one-shot pruning with an OBS sweep (Frantar, Alistarh, arXiv:2301.00774)."""

from __future__ import annotations

from wanda.methods import METHODS, Method


@METHODS.register
class SparseGPT(Method):
    """(obs, 128 columns over all rows, iterative obs sweep, uniform)."""

    score = "obs"
    group = "block:128"
    update = "obs"
