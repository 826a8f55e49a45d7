"""Allocations: their formulas, and totals that equal uniform's exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from problems import gathered, inputs, weights
from wanda.allocation import ALLOCATIONS, BlockMeasure, level, share_out
from wanda.patterns import NM, Unstructured, Variant
from wanda.statistics import Needs

shapes_of_blocks = st.lists(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=4), min_size=1, max_size=6
)


@settings(max_examples=80)
@given(
    st.sampled_from(ALLOCATIONS.names()),
    shapes_of_blocks,
    st.fractions(0, Fraction(99, 100), max_denominator=1000),
    st.sampled_from(["row", "layer", "column", 8, "variant"]),
    st.data(),
)
def test_the_total_is_uniforms(name: str, shapes, sparsity: Fraction, group: str | int, data: st.DataObject) -> None:
    pattern = Variant(sparsity) if group == "variant" else Unstructured(sparsity, group)
    sizes = [sum(out * width for out, width in block) for block in shapes]
    measures = [BlockMeasure(data.draw(st.floats(0, 100)), size) for size in sizes]
    sparsities = ALLOCATIONS.get(name).allocate(measures, sparsity)
    assert all(0 <= s <= 1 for s in sparsities)
    assert sum(s * size for s, size in zip(sparsities, sizes, strict=True)) == sparsity * sum(sizes)
    patterns = share_out(shapes, sparsities, pattern)
    removed = total = 0
    for block, block_shapes in zip(patterns, shapes, strict=True):
        for chosen, (out, width) in zip(block, block_shapes, strict=True):
            count = int((~chosen.mask(torch.rand(out, width))).sum())
            assert count == chosen.removed(out, width)
            removed, total = removed + count, total + pattern.removed(out, width)
    assert removed == total


def test_uniform_shares_leave_the_pattern_as_it_is() -> None:
    pattern = NM(2, 4)
    assert share_out([[(4, 8)], [(2, 4)]], [pattern.sparsity] * 2, pattern) == [[pattern], [pattern]]
    with pytest.raises(ValueError, match="N:M"):
        share_out([[(4, 8)], [(2, 4)]], [Fraction(1, 4), Fraction(3, 4)], pattern)


@pytest.mark.parametrize("name", ["owl", "alpha"])
def test_blocks_with_nothing_to_prune_change_nothing(name: str) -> None:
    blocks = [BlockMeasure(3.0, 100), BlockMeasure(5.0, 300), BlockMeasure(4.0, 50)]
    alone = ALLOCATIONS.get(name).allocate(blocks, Fraction(1, 2))
    beside = ALLOCATIONS.get(name).allocate([BlockMeasure(0.0, 0), *blocks, BlockMeasure(0.0, 0)], Fraction(1, 2))
    assert beside[1:-1] == alone and len(set(alone)) == 3


def test_owl_is_the_papers_formula() -> None:
    blocks = []
    for block in range(4):
        matrices = [
            (weights(20, 16, seed=10 * block + k) ** (1 + 2 * (block % 3)), inputs(90, 16, seed=k)) for k in (1, 2)
        ]
        blocks.append(matrices)
    owl = ALLOCATIONS.get("owl")
    values = [owl.measure([(w, gathered(x, needs=Needs.NORMS)) for w, x in block]) for block in blocks]
    shares = []
    for block in blocks:  # outliers of all of a block's scores together, in percent
        scores = torch.cat([(w.abs() * x.norm(dim=0)).flatten() for w, x in block])
        shares.append(100 * float((scores > 5 * scores.mean()).float().mean()))
    assert values == pytest.approx(shares, abs=0.2)
    low, high = min(values), max(values)
    keep = [(value - low) / (high - low) * 2 * 0.08 for value in values]
    keep = [k + (1 - 0.7) - sum(keep) / 4 for k in keep]
    ours = owl.allocate([BlockMeasure(value, 640) for value in values], Fraction(7, 10))
    assert [1 - float(s) for s in ours] == pytest.approx(keep, abs=1e-4)


def test_alpha_follows_the_tail_of_the_spectrum() -> None:
    alpha = ALLOCATIONS.get("alpha")
    q, _ = torch.linalg.qr(weights(40, 40))
    for exponent in (2.0, 4.0):  # eigenvalues drawn by rank from a Pareto density p(x) ~ x^-exponent
        ranks = (torch.arange(40.0) + 0.5) / 40
        eigenvalues = ranks ** (-1 / (exponent - 1))
        w = q @ eigenvalues.sqrt().diag() @ q.T
        assert alpha.measure([(w, gathered(torch.ones(1, 40), needs=Needs.NOTHING))]) == pytest.approx(
            exponent, rel=0.1
        )
    low, high = alpha.allocate([BlockMeasure(2.0, 100), BlockMeasure(4.0, 100)], Fraction(1, 2))
    assert (float(low), float(high)) == pytest.approx((0.35, 0.65), abs=1e-4)


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_equal_blocks_get_equal_shares(name: str) -> None:
    measures = [BlockMeasure(1.5, 100), BlockMeasure(1.5, 300)]
    assert [float(s) for s in ALLOCATIONS.get(name).allocate(measures, Fraction(3, 5))] == pytest.approx(
        [0.6, 0.6], abs=1e-5
    )


def test_level_clamps_and_keeps_the_mean() -> None:
    shares = level([0.0, 5.0, 0.2], [100, 50, 100], Fraction(1, 2))
    assert shares[1] == 1 and sum(s * w for s, w in zip(shares, (100, 50, 100), strict=True)) == 125
    assert float(shares[2] - shares[0]) == pytest.approx(0.2, abs=1e-4)
