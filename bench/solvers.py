"""Price of every solver on one matrix, in units of one float32 product of its size taken beside it in the same run.

    python bench/solvers.py [--size 4096] [--rounds 3] [--tokens 8192] [--all] [--out bench/results/solvers.json]

Products and solvers alternate; the table gives minimum, median and maximum of the solver's seconds over the mean of
the products just before and just after it. Factors that matrices with the same input share are priced by themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics as summary
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from facts import processor
from options import positive
from wanda.composition import Composition
from wanda.factors import admm_inverse, inverse_factor
from wanda.patterns import NM, Pattern, Unstructured
from wanda.scores import SCORES
from wanda.statistics import Needs, Statistics
from wanda.updates import UPDATES, Problem


def machine() -> str:
    """The processor's name and the threads in use."""
    return f"{processor()}, {torch.get_num_threads()} threads"


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def correlated_inputs(tokens: int, width: int) -> Tensor:
    """Inputs with a decaying spectrum and uneven norms, as activations have: [tokens, width] bfloat16."""
    low = torch.randn(tokens, width // 8) @ torch.randn(width // 8, width) / (width // 8) ** 0.5
    return ((low + 0.5 * torch.randn(tokens, width)) * torch.rand(width).mul(2).exp()).bfloat16()


HALF, TWO_OF_FOUR = Unstructured(Fraction(1, 2)), NM(2, 4)
HALF_OF_128 = Unstructured(Fraction(1, 2), 128)


class Matrix:
    """A square matrix, its inputs and their statistics; methods make what is timed."""

    def __init__(self, size: int, tokens: int):
        torch.manual_seed(0)
        self.weight = torch.randn(size, size) * 0.02
        self.inputs = correlated_inputs(tokens, size)
        self.statistics = Statistics(size, Needs.GRAM, inherit=True)
        self.statistics.update(self.inputs, self.inputs + 0.1 * torch.randn(self.inputs.shape).bfloat16())
        self.gram_only = Statistics(size, Needs.GRAM)
        self.scores = self.weight.abs()

    def make_factors(self) -> None:
        """What matrices with the same input share, as far as it is not there."""
        inverse_factor(self.statistics), admm_inverse(self.statistics)

    def gram(self) -> Callable[[], Any]:
        return lambda: (self.gram_only.update(self.inputs), self.gram_only.gram)

    def factor(self, make: Callable[[Statistics], Any]) -> Callable[[], Any]:
        def work() -> None:
            self.statistics.cache.clear()
            make(self.statistics)

        return work

    def mask(self, pattern: Pattern) -> Callable[[], Any]:
        return lambda: pattern.mask(self.scores)

    def update(self, name: str, pattern: Pattern, score: str = "wanda", inherit: float = 0.0) -> Callable[[], Any]:
        """Shared factors and the mask of a fixed-mask update are there already."""
        solver, size = UPDATES.get(name), len(self.weight)
        scorer = SCORES.get(score).prepare(self.weight, self.statistics)
        select = lambda columns_weight, columns: pattern.mask(  # noqa: E731
            scorer(columns_weight, columns), columns.start or 0, size
        )
        mask = select(self.weight, slice(None)) if solver.takes_chain else None

        def work() -> None:
            solver(Problem(self.weight, self.statistics, pattern, select, inherit, mask=mask))

        return work

    def whole(self, name: str, pattern: Pattern, inherit: float = 0.0) -> Callable[[], Any]:
        def work() -> None:
            self.statistics.cache.clear()
            Composition(None, name, inherit).prune(self.weight, self.statistics, pattern, name)

        return work


Row = Callable[[Matrix], Callable[[], Any]]
SLOW: dict[str, Row] = {
    "swap, rows": lambda m: m.update("swap", HALF),
    "swap, 2:4": lambda m: m.update("swap", TWO_OF_FOUR),
    "fast: admm-relaxed, whole": lambda m: m.whole("admm-relaxed", HALF),
    "best: the same, inherited errors": lambda m: m.whole("admm-relaxed", HALF, 0.5),
}


def rows_of(tokens: int) -> dict[str, Row]:
    """The rows that are always measured, by name."""
    return {
        f"Gram matrix, {tokens} bfloat16 tokens": lambda m: m.gram(),
        "factor of the sweep (once per input)": lambda m: m.factor(inverse_factor),
        "inverse of ADMM (once per input)": lambda m: m.factor(admm_inverse),
        "mask, half of each row": lambda m: m.mask(HALF),
        "mask, half of 128 columns": lambda m: m.mask(HALF_OF_128),
        "mask, 2:4": lambda m: m.mask(TWO_OF_FOUR),
        "pcg, 10 steps": lambda m: m.update("pcg", HALF),
        "pcg, 10 steps, inherited errors": lambda m: m.update("pcg", HALF, inherit=0.5),
        "obs, 128 columns": lambda m: m.update("obs", HALF_OF_128, "obs"),
        "obs, 2:4": lambda m: m.update("obs", TWO_OF_FOUR, "obs"),
        "obs-sequential": lambda m: m.update("obs-sequential", HALF),
        "admm, 20 steps": lambda m: m.update("admm", HALF),
        "admm-iterative, 20 steps": lambda m: m.update("admm-iterative", HALF),
        "admm-iterative, 20 steps, 2:4": lambda m: m.update("admm-iterative", TWO_OF_FOUR),
        "admm-relaxed, 20 steps": lambda m: m.update("admm-relaxed", HALF),
        "admm-relaxed, 20 steps, 2:4": lambda m: m.update("admm-relaxed", TWO_OF_FOUR),
        "admm-relaxed, 20 steps, inherited errors": lambda m: m.update("admm-relaxed", HALF, inherit=0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=positive, default=4096)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--out", type=Path, help="bench/results/solvers.json; nothing is written with --only alone")
    parser.add_argument("--all", action="store_true", help="swap (minutes) and whole compositions as well")
    parser.add_argument("--only", default="", help="measure only the rows whose name contains this")
    arguments = parser.parse_args()
    size = arguments.size
    rows = rows_of(arguments.tokens) | (SLOW if arguments.all else {})
    chosen = {name: row for name, row in rows.items() if arguments.only in name}
    if not chosen:
        slow = " with --all" if any(arguments.only in name for name in SLOW) else ""
        there = "; ".join(SLOW if slow else rows)
        parser.error(f"no row's name contains {arguments.only!r}; there are{slow}: {there}")
    matrix = Matrix(size, arguments.tokens)
    works = {name: make(matrix) for name, make in chosen.items()}
    matrix.make_factors()
    weight, other = matrix.weight, torch.randn(size, size)
    product = lambda: weight @ other  # noqa: E731
    product()
    ratios: dict[str, list[float]] = {name: [] for name in works}
    products: list[float] = []
    for _ in range(arguments.rounds):
        for name, work in works.items():
            matrix.make_factors()
            before = seconds(product)
            taken = seconds(work)
            after = seconds(product)
            products += [before, after]
            ratios[name].append(2 * taken / (before + after))
    unit = summary.median(products)
    table = {
        name: {"min": min(values), "median": summary.median(values), "max": max(values)}
        for name, values in ratios.items()
    }
    print(f"{machine()}; one float32 product of {size}^3: {unit:.3f} s (median of {len(products)})")
    print(f"{'in products of that size':40} {'min':>8} {'median':>8} {'max':>8}")
    for name, row in table.items():
        print(f"{name:40} {row['min']:8.2f} {row['median']:8.2f} {row['max']:8.2f}")
    if arguments.out is None and not arguments.only:
        arguments.out = Path(__file__).parent / "results" / "solvers.json"
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "machine": machine(),
            "torch": torch.__version__,
            "size": size,
            "rounds": arguments.rounds,
            "product_seconds": unit,
            "products": {name: {key: round(value, 3) for key, value in row.items()} for name, row in table.items()},
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
