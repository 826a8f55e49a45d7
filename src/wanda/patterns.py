"""Patterns: which weights compete with each other, and how many of them survive.

Counts are exact (reference: floor(n s) of a group of n go, s an exact decimal); ties go by position, earlier first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from wanda.errors import ConfigurationError


def exact(sparsity: float | str | Fraction) -> Fraction:
    """The sparsity as an exact decimal: 0.29 is 29/100, not its nearest binary fraction."""
    return sparsity if isinstance(sparsity, Fraction) else Fraction(str(sparsity))


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest entries of every row of scores [groups, n]; ties by position, earlier first.

    Equivalent to a stable ascending sort of each row; found by the value of rank `count`. Returns bool [groups, n].
    """
    groups, n = scores.shape
    if count <= 0:
        return torch.zeros(groups, n, dtype=torch.bool, device=scores.device)
    if count >= n:
        return torch.ones(groups, n, dtype=torch.bool, device=scores.device)
    threshold = torch.kthvalue(scores, count, dim=1, keepdim=True).values
    marked = scores < threshold
    missing = count - marked.sum(dim=1, keepdim=True)
    ties = scores == threshold
    if bool((ties.sum(dim=1, keepdim=True) != missing).any()):
        ties &= ties.cumsum(dim=1) <= missing
    return marked | ties


@dataclass(frozen=True)
class Unstructured:
    """floor(n * sparsity) of every comparison group of n weights are removed.

    group: "row" (each output), "layer" (the whole matrix), "column" (each input), or an int k: k columns over all rows.
    """

    sparsity: Fraction
    group: str | int = "row"

    @property
    def text(self) -> str:
        return f"{float(self.sparsity):g} per {f'{self.group} columns' if isinstance(self.group, int) else self.group}"

    @property
    def step(self) -> int:
        """Slices of columns that are pruned by themselves start and end at multiples of this."""
        return self.group if isinstance(self.group, int) else 1

    def mask(self, scores: Tensor) -> Tensor:
        """scores: [out, in] -> bool [out, in], True survives."""
        out, width = scores.shape
        if self.group == "row":
            return ~lowest(scores, int(width * self.sparsity))
        if self.group == "layer":
            return ~lowest(scores.reshape(1, -1), int(out * width * self.sparsity)).reshape(out, width)
        if self.group == "column":
            return ~lowest(scores.T.contiguous(), int(out * self.sparsity)).T
        assert isinstance(self.group, int)
        masks = []
        for part in scores.split(self.group, dim=1):
            flat = lowest(part.reshape(1, -1), int(part.numel() * self.sparsity))
            masks.append(~flat.reshape(part.shape))
        return torch.cat(masks, dim=1)

    def removed(self, out: int, width: int) -> int:
        """How many weights of an [out, width] matrix go: the sum over its groups."""
        s = self.sparsity
        if self.group == "row":
            return out * int(width * s)
        if self.group == "layer":
            return int(out * width * s)
        if self.group == "column":
            return width * int(out * s)
        assert isinstance(self.group, int)
        return sum(int(out * min(self.group, width - start) * s) for start in range(0, width, self.group))


@dataclass(frozen=True)
class NM:
    """n survive of every m consecutive inputs of a row."""

    n: int
    m: int

    @property
    def sparsity(self) -> Fraction:
        return 1 - Fraction(self.n, self.m)

    @property
    def text(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def step(self) -> int:
        return self.m

    def mask(self, scores: Tensor) -> Tensor:
        """scores: [out, in], in divisible by m -> bool [out, in], True survives."""
        out, width = scores.shape
        return ~lowest(scores.reshape(-1, self.m), self.m - self.n).reshape(out, width)

    def removed(self, out: int, width: int) -> int:
        """How many weights of an [out, width] matrix go."""
        return out * (width // self.m) * (self.m - self.n)

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
    """

    sparsity: Fraction
    tolerance: float = 0.001

    @property
    def text(self) -> str:
        return f"{float(self.sparsity):g} per row on average (variant)"

    @property
    def step(self) -> int:
        return 1

    def removed(self, out: int, width: int) -> int:
        return out * int(width * self.sparsity)

    def mask(self, scores: Tensor) -> Tensor:
        """scores: [out, in] -> bool [out, in], True survives."""
        out, width = scores.shape
        wanted = self.removed(out, width)
        ordered, position = scores.sort(dim=1, stable=True)
        total = ordered.sum(dim=1, keepdim=True)
        share = ordered.cumsum(dim=1) / torch.where(total > 0, total, 1)  # of the row's sum, nondecreasing
        low, high, alpha = 0.0, 0.8, 0.4
        while True:
            removed = int((share <= alpha).sum())
            if abs(removed - wanted) <= self.tolerance * scores.numel() or high - low < 1e-6:
                break
            low, high = (low, alpha) if removed > wanted else (alpha, high)
            alpha = (low + high) / 2
        # Trim or top up: the entries whose share is nearest to alpha change sides first.
        sides = share <= alpha
        if removed != wanted:
            surplus = removed > wanted
            distance = torch.where(sides == surplus, (share - alpha).abs(), torch.inf).flatten()
            sides.view(-1)[lowest(distance[None], abs(removed - wanted))[0]] = not surplus
        return torch.empty_like(sides).scatter_(1, position, ~sides)


Pattern = Unstructured | NM | Variant
