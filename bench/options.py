"""Types of command line options that several scripts share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number of at least one: zero rounds, samples or blocks would measure nothing, minutes later."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return number
