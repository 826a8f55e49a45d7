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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="bench/results/solvers.json; nothing is written with --only alone")
    parser.add_argument("--all", action="store_true", help="swap (minutes) and whole compositions as well")
    parser.add_argument("--only", default="", help="measure only the rows whose name contains this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    size = arguments.size
    weight = torch.randn(size, size) * 0.02
    inputs = correlated_inputs(arguments.tokens, size)
    statistics = Statistics(size, Needs.GRAM, inherit=True)
    statistics.update(inputs, inputs + 0.1 * torch.randn(inputs.shape).bfloat16())
    gram_only = Statistics(size, Needs.GRAM)
    half, two_of_four = Unstructured(Fraction(1, 2)), NM(2, 4)

    def factor(make: Callable[[Statistics], Any]) -> Callable[[], Any]:
        def work() -> None:
            statistics.cache.clear()
            make(statistics)

        return work

    def update(name: str, pattern: Pattern, score: str = "wanda", inherit: float = 0.0) -> Callable[[], Any]:
        """Shared factors and the mask of a fixed-mask update are there already."""
        solver = UPDATES.get(name)
        scorer = SCORES.get(score).prepare(weight, statistics)
        select = lambda columns_weight, columns: pattern.mask(  # noqa: E731
            scorer(columns_weight, columns), columns.start or 0, size
        )
        mask = select(weight, slice(None)) if solver.takes_chain else None

        def work() -> None:
            solver(Problem(weight, statistics, pattern, select, inherit, mask=mask))

        return work

    def whole(name: str, pattern: Pattern, inherit: float = 0.0) -> Callable[[], Any]:
        def work() -> None:
            statistics.cache.clear()
            Composition(None, name, inherit).prune(weight, statistics, pattern, name)

        return work

    scores = weight.abs()
    rows: dict[str, Callable[[], Any]] = {
        f"Gram matrix, {arguments.tokens} bfloat16 tokens": lambda: (gram_only.update(inputs), gram_only.gram),
        "factor of the sweep (once per input)": factor(inverse_factor),
        "inverse of ADMM (once per input)": factor(admm_inverse),
        "mask, half of each row": lambda: half.mask(scores),
        "mask, half of 128 columns": lambda: Unstructured(Fraction(1, 2), 128).mask(scores),
        "mask, 2:4": lambda: two_of_four.mask(scores),
        "pcg, 10 steps": update("pcg", half),
        "pcg, 10 steps, inherited errors": update("pcg", half, inherit=0.5),
        "obs, 128 columns": update("obs", Unstructured(Fraction(1, 2), 128), "obs"),
        "obs, 2:4": update("obs", two_of_four, "obs"),
        "obs-sequential": update("obs-sequential", half),
        "admm, 20 steps": update("admm", half),
        "admm-iterative, 20 steps": update("admm-iterative", half),
        "admm-iterative, 20 steps, 2:4": update("admm-iterative", two_of_four),
        "admm-relaxed, 20 steps": update("admm-relaxed", half),
        "admm-relaxed, 20 steps, 2:4": update("admm-relaxed", two_of_four),
        "admm-relaxed, 20 steps, inherited errors": update("admm-relaxed", half, inherit=0.5),
    }
    slow: dict[str, Callable[[], Any]] = {
        "swap, rows": update("swap", half),
        "swap, 2:4": update("swap", two_of_four),
        "fast: admm-relaxed, whole": whole("admm-relaxed", half),
        "best: the same, inherited errors": whole("admm-relaxed", half, 0.5),
    }
    if arguments.all:
        rows |= slow
    rows = {name: work for name, work in rows.items() if arguments.only in name}
    inverse_factor(statistics), admm_inverse(statistics)
    other = torch.randn(size, size)
    product = lambda: weight @ other  # noqa: E731
    product()
    ratios: dict[str, list[float]] = {name: [] for name in rows}
    products: list[float] = []
    for _ in range(arguments.rounds):
        for name, work in rows.items():
            inverse_factor(statistics), admm_inverse(statistics)
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
