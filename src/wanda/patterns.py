"""Patterns: which weights compete with each other, and how many of them survive.

Counts are exact (reference: floor(n s) of a group of n go, s an exact decimal); ties go by position, earlier first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from wanda.errors import ConfigurationError
from wanda.kernels.selection import FEW, clear_lost, lowest, lowest_of_few

_INFINITY = 0x7F800000  # the bits of a float32


def exact(sparsity: float | str | Fraction) -> Fraction:
    """The sparsity as an exact decimal: 0.29 is 29/100, not its nearest binary fraction."""
    return sparsity if isinstance(sparsity, Fraction) else Fraction(str(sparsity))


def share(total: int, start: int, stop: int, width: int) -> int:
    """What the columns [start, stop) of `width` lose of `total`; slices that fill the width sum to the total."""
    return total * stop // width - total * start // width


@dataclass(frozen=True)
class Unstructured:
    """floor(n * sparsity) of every comparison group of n weights are removed.

    group: "row" (each output), "layer" (the whole matrix), "column" (each input), or an int k: k columns over all rows.
    spread: the matrix as a whole loses floor(out * in * sparsity), and its groups differ by at most one (by their
        size, for the last group of k columns); what an allocation asks for, whose total is exact.

    Masks of a slice of columns remove that slice's share, so that slices which fill the matrix sum to its count.
    """

    sparsity: Fraction
    group: str | int = "row"
    spread: bool = False

    @property
    def text(self) -> str:
        """The pattern in words, for reports."""
        return f"{float(self.sparsity):g} per {f'{self.group} columns' if isinstance(self.group, int) else self.group}"

    @property
    def step(self) -> int:
        """Slices of columns that are pruned by themselves start and end at multiples of this."""
        return self.group if isinstance(self.group, int) else 1

    @property
    def by_row(self) -> bool:
        """Some rows by themselves get the mask that they get among all rows."""
        return self.group == "row" and not self.spread

    def at(self, sparsity: Fraction) -> Unstructured:
        """The same pattern at another sparsity, as on the way of a gradual method to its own."""
        return replace(self, sparsity=sparsity)

    def mask(self, scores: Tensor, start: int = 0, width: int | None = None) -> Tensor:
        """scores: [out, k] of the columns from `start` of a matrix of `width` -> bool [out, k], True survives."""
        out, k = scores.shape
        width = k if width is None else width
        stop = start + k
        if self.group == "row":
            if self.spread:
                whole = int(out * width * self.sparsity)
                rows = [share(whole, row, row + 1, out) for row in range(out)]
                return ~lowest(scores, [share(row, start, stop, width) for row in rows])
            return ~lowest(scores, share(int(width * self.sparsity), start, stop, width))
        if self.group == "layer":
            count = share(int(out * width * self.sparsity), start, stop, width)
            return ~lowest(scores.reshape(1, -1), count).reshape(out, k)
        size = 1 if self.group == "column" else int(self.group)
        masks = []
        if start % size:
            raise ValueError(f"a slice from column {start} does not start at a multiple of {size}")
        if size == 1:
            return ~lowest(scores.T.contiguous(), [self._lost(out, c, c + 1, width) for c in range(start, stop)]).T
        for part in scores.split(size, dim=1):
            count = self._lost(out, start, start + part.shape[1], width)
            masks.append(~lowest(part.reshape(1, -1), count).reshape(part.shape))
            start += part.shape[1]
        return torch.cat(masks, dim=1)

    def _lost(self, out: int, start: int, stop: int, width: int) -> int:
        """What the group of the columns [start, stop) over all rows loses."""
        if self.spread:
            return share(int(out * width * self.sparsity), start, stop, width)
        return int(out * (stop - start) * self.sparsity)

    def removed(self, out: int, width: int) -> int:
        """How many weights of an [out, width] matrix go: the sum over its groups."""
        s = self.sparsity
        if self.spread or self.group == "layer":
            return int(out * width * s)
        if self.group == "row":
            return out * int(width * s)
        if self.group == "column":
            return width * int(out * s)
        size = int(self.group)
        return sum(int(out * min(size, width - start) * s) for start in range(0, width, size))


def _infinite_beside(scores: Tensor, marked: Tensor) -> Tensor:
    """torch.where(marked, scores, inf) for float32, in 0.4 of its time on a CPU: the infinities are bits."""
    infinities = marked.view(torch.uint8).to(torch.int32).sub_(1).bitwise_and_(_INFINITY).view(torch.float32)
    return clear_lost(scores.clone(), marked).add_(infinities)


@dataclass(frozen=True)
class NM:
    """n survive of every m consecutive inputs of a row.

    partial: on the way of a gradual method: the n largest of every m are protected, the others compete in the whole
        row and go up to this sparsity; None for the pattern itself.
    """

    n: int
    m: int
    partial: Fraction | None = None

    @property
    def sparsity(self) -> Fraction:
        """Share of the weights that go."""
        return 1 - Fraction(self.n, self.m)

    @property
    def text(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def step(self) -> int:
        return self.m

    @property
    def by_row(self) -> bool:
        return True

    def at(self, sparsity: Fraction) -> NM:
        """The pattern on its way at a lower sparsity."""
        return replace(self, partial=None if sparsity >= self.sparsity else sparsity)

    def mask(self, scores: Tensor, start: int = 0, width: int | None = None) -> Tensor:
        """scores: [out, k] of whole groups, k divisible by m -> bool [out, k], True survives."""
        out, k = scores.shape
        groups = scores.reshape(-1, self.m)
        marked = (lowest_of_few if self.m <= FEW else lowest)(groups, self.m - self.n).reshape(out, k)
        if self.partial is not None:
            marked = lowest(_infinite_beside(scores, marked), int(k * self.partial))
        return ~marked

    def removed(self, out: int, width: int) -> int:
        """How many weights of an [out, width] matrix go."""
        return out * (width // self.m) * (self.m - self.n)

    def obeyed(self, survives: Tensor) -> bool:
        """Whether every group of M consecutive inputs keeps at most N; survives: [out, in], not zero what is kept."""
        if survives.shape[1] % self.m:
            return False
        return bool((torch.count_nonzero(survives.reshape(-1, self.m), dim=1) <= self.n).all())

    @staticmethod
    def parse(text: str) -> NM:
        """ "2:4" -> NM(2, 4); raises ConfigurationError when it is no N:M with 1 <= N <= M."""
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if not match:
            raise ConfigurationError(f"pattern {text!r} is not of the form N:M, such as 2:4 (N survive of every M)")
        n, m = int(match[1]), int(match[2])
        if n > m:
            raise ConfigurationError(
                f"pattern {text}: N = {n} weights cannot survive of M = {m}; did you mean {m}:{n}?"
            )
        if n < 1:
            raise ConfigurationError(f"pattern {text}: N must be at least 1, the number that survives of every M")
        return NM(n, m)


@dataclass(frozen=True)
class Variant:
    """Wanda's variant (arXiv:2306.11695, appendix): in each row the smallest scores go whose running sum stays within
    alpha times the row's sum; one alpha for the matrix, found by bisection so that the wanted number of weights goes.

    The bisection starts at 0.4 in [0, 0.8] as the paper's does and goes on until the counts differ by less than 0.001;
    the last weights are trimmed or topped up by their place in the running sums, so that the total is exact.

    spread: the matrix loses floor(out * in * sparsity), not out * floor(in * sparsity).
    """

    sparsity: Fraction
    tolerance: float = 0.001
    spread: bool = False

    @property
    def text(self) -> str:
        return f"{float(self.sparsity):g} per row on average (variant)"

    @property
    def step(self) -> int:
        return 1

    @property
    def by_row(self) -> bool:
        return False

    def at(self, sparsity: Fraction) -> Variant:
        """The same pattern at another sparsity."""
        return replace(self, sparsity=sparsity)

    def removed(self, out: int, width: int) -> int:
        """How many weights of an [out, width] matrix go."""
        return int(out * width * self.sparsity) if self.spread else out * int(width * self.sparsity)

    def mask(self, scores: Tensor, start: int = 0, width: int | None = None) -> Tensor:
        """scores: [out, k] of the columns from `start` of a matrix of `width` -> bool [out, k], True survives."""
        out, k = scores.shape
        width = k if width is None else width
        wanted = share(self.removed(out, width), start, start + k, width)
        ordered, position = scores.sort(dim=1, stable=True)
        total = ordered.sum(dim=1, keepdim=True)
        portion = ordered.cumsum(dim=1) / torch.where(total > 0, total, 1)  # of the row's sum, nondecreasing
        low, high, alpha = 0.0, 0.8, 0.4
        while True:
            removed = int((portion <= alpha).sum())
            if abs(removed - wanted) <= self.tolerance * scores.numel() or high - low < 1e-6:
                break
            low, high = (low, alpha) if removed > wanted else (alpha, high)
            alpha = (low + high) / 2
        # Trim or top up: the entries whose portion is nearest to alpha change sides first.
        sides = portion <= alpha
        if removed != wanted:
            surplus = removed > wanted
            distance = torch.where(sides == surplus, (portion - alpha).abs(), torch.inf).flatten()
            sides.view(-1)[lowest(distance[None], abs(removed - wanted))[0]] = not surplus
        return torch.empty_like(sides).scatter_(1, position, ~sides)


Pattern = Unstructured | NM | Variant


def group_named(text: str) -> str | int:
    """ "row", "layer", "column" or "block:K" -> the comparison group; raises ConfigurationError for another text."""
    if text in ("row", "layer", "column"):
        return text
    match = re.fullmatch(r"block:([1-9]\d*)", text)
    if not match:
        raise ConfigurationError(f"unknown group {text!r}: there are row, layer, column and block:K (K columns)")
    return int(match[1])
