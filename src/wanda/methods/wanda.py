"""Wanda: pruning by weights and activations (Sun, Liu, Bair, Kolter, arXiv:2306.11695)."""

from __future__ import annotations

from wanda.methods import METHODS, Method


@METHODS.register
class Wanda(Method):
    """(wanda, row, none, uniform)."""

    score = "wanda"
    group = "row"
