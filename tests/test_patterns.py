"""Patterns: exact counts, ties by position, and the variant against loops."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from problems import PATTERNS
from wanda.errors import ConfigurationError
from wanda.patterns import NM, Unstructured, Variant, exact, group_named

seeds = st.integers(0, 10**6)


def test_counts_are_those_of_the_exact_decimal() -> None:
    scores = torch.rand(3, 1600)
    assert (~Unstructured(exact(0.29)).mask(scores)).sum(dim=1).tolist() == [464] * 3
    assert Unstructured(exact("0.29")).removed(3, 1600) == 3 * 464


@pytest.mark.parametrize("name", PATTERNS)
def test_masks_have_the_counts_that_they_announce(name: str) -> None:
    pattern = PATTERNS[name]
    scores = torch.rand(20, 80, generator=torch.Generator().manual_seed(0))
    mask = pattern.mask(scores)
    assert int((~mask).sum()) == pattern.removed(20, 80)
    if isinstance(pattern, NM):
        assert bool((mask.view(20, -1, pattern.m).sum(dim=2) == pattern.n).all())


@settings(max_examples=60)
@given(st.sampled_from(sorted(PATTERNS)), seeds, st.integers(1, 9), st.integers(1, 6))
def test_slices_that_fill_the_matrix_sum_to_its_count(name: str, seed: int, out: int, parts: int) -> None:
    pattern = PATTERNS[name]
    width = 32 * parts
    scores = torch.rand(out, width, generator=torch.Generator().manual_seed(seed))
    masks = [pattern.mask(scores[:, a : a + 32], a, width) for a in range(0, width, 32)]
    assert int((~torch.cat(masks, dim=1)).sum()) == pattern.removed(out, width)


@settings(max_examples=60)
@given(
    st.fractions(0, Fraction(99, 100), max_denominator=997),
    st.sampled_from(["row", "layer", "column", 7]),
    st.integers(1, 12),
    st.integers(1, 40),
)
def test_a_spread_matrix_loses_its_share_and_groups_differ_by_one(
    sparsity: Fraction, group: str | int, out: int, width: int
) -> None:
    mask = Unstructured(sparsity, group, spread=True).mask(torch.rand(out, width))
    assert int((~mask).sum()) == int(out * width * sparsity)
    if group in ("row", "column"):
        counts = (~mask).sum(dim=1 if group == "row" else 0)
        assert int(counts.max() - counts.min()) <= 1


def test_groups_compete_by_themselves() -> None:
    scores = torch.arange(12.0).view(2, 6)
    half = Fraction(1, 2)
    assert Unstructured(half, "row").mask(scores).int().tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert Unstructured(half, "layer").mask(scores).int().tolist() == [[0] * 6, [1] * 6]
    assert Unstructured(half, "column").mask(scores).int().tolist() == [[0] * 6, [1] * 6]
    assert Unstructured(half, 4).mask(scores.flip(1)).int().tolist() == [[0] * 6, [1] * 6]
    assert NM(1, 3).mask(scores).int().tolist() == [[0, 0, 1, 0, 0, 1]] * 2


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(5, 8)])
def test_n_m_on_its_way_protects_the_largest_of_every_group(pattern: NM) -> None:
    scores = torch.rand(10, 64, generator=torch.Generator().manual_seed(2))
    final = pattern.mask(scores)
    for sparsity in (Fraction(0), Fraction(1, 7), Fraction(1, 3), pattern.sparsity):
        mask = pattern.at(sparsity).mask(scores)
        assert bool((mask | ~final).all())  # whoever survives at the end survives on the way
        assert (~mask).sum(dim=1).tolist() == [int(64 * sparsity)] * 10
        for row in range(10):  # and of the others the lowest of the whole row go
            gone, left = scores[row][~mask[row]], scores[row][mask[row] & ~final[row]]
            assert gone.numel() == 0 or left.numel() == 0 or float(gone.max()) <= float(left.min())
    assert torch.equal(pattern.at(pattern.sparsity).mask(scores), final)


def test_the_variant_has_one_alpha_for_all_rows() -> None:
    scores = torch.rand(30, 50, generator=torch.Generator().manual_seed(5)) ** 3
    mask = Variant(Fraction(1, 2)).mask(scores)
    assert int((~mask).sum()) == 30 * 25
    assert len(set(mask.sum(dim=1).tolist())) > 1
    # The loop: bisect alpha; in each row the smallest go while their running sum is at most alpha times the row's.
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        rows = []
        for row in scores.double().tolist():
            running, gone = 0.0, 0
            for value in sorted(row):
                running += value
                if running > alpha * sum(row):
                    break
                gone += 1
            rows.append(gone)
        if abs(sum(rows) / scores.numel() - 0.5) < 0.001:
            break
        low, high = (low, alpha) if sum(rows) > scores.numel() / 2 else (alpha, high)
        alpha = (low + high) / 2
    ours = (~mask).sum(dim=1)
    assert int((ours - torch.tensor(rows)).abs().sum()) <= 0.001 * scores.numel() + 1  # but for trimming
    for row in range(30):  # the smallest of each row
        assert float(scores[row][~mask[row]].max()) < float(scores[row][mask[row]].min())


def test_the_variant_of_equal_scores_still_counts_right() -> None:
    assert int(Variant(Fraction(3, 10)).mask(torch.zeros(4, 20)).sum()) == 4 * 14
    assert int(Variant(Fraction(3, 10)).mask(torch.ones(4, 20)).sum()) == 4 * 14


def test_texts() -> None:
    assert group_named("block:128") == 128 and group_named("row") == "row"
    for text in ("block:0", "rows", "block:x"):
        with pytest.raises(ConfigurationError, match="group"):
            group_named(text)
    assert NM.parse("2:4") == NM(2, 4)
    for text, told in (("4:2", "did you mean 2:4"), ("0:4", "at least 1"), ("2/4", "N:M")):
        with pytest.raises(ConfigurationError, match=told):
            NM.parse(text)
