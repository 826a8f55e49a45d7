"""Statistics against sums in float64."""

from __future__ import annotations

import pytest
import torch

from problems import gathered, inputs
from wanda.statistics import Needs, Statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 128, 300])
def test_sums_agree_with_float64(dtype: torch.dtype, width: int) -> None:
    x = inputs(2500, width).to(dtype)
    dense = (x + 0.1 * inputs(2500, width, seed=3)).to(dtype)
    statistics = Statistics(width, Needs.GRAM, inherit=True)
    for part, dense_part in zip(x.split(1100), dense.split(1100), strict=True):
        statistics.update(part.view(1, -1, width), dense_part.view(1, -1, width))
        assert torch.equal(statistics.gram, statistics.gram.T)  # read between updates, too
    gram = x.double().T @ x.double()
    lag = (dense.double() - x.double()).T @ x.double()
    scale = gram.diagonal().sqrt()
    assert float(((statistics.gram - gram) / scale / scale[:, None]).abs().max()) < 1e-5
    assert torch.equal(statistics.gram.diagonal(), statistics.square_sum)
    assert statistics.tokens == 2500
    error = float((statistics.lag - lag).norm() / lag.norm())
    assert error < (4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_gram_stays_positive_definite_where_it_is() -> None:
    x = inputs(600, 200).bfloat16()
    assert torch.linalg.eigvalsh(gathered(x).gram.double())[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_alone_agree_with_the_gram_matrix(dtype: torch.dtype) -> None:
    x = inputs(3000, 60).to(dtype)
    norms = gathered(x, needs=Needs.NORMS)
    assert norms.gram is None and norms.lag is None
    torch.testing.assert_close(norms.square_sum, gathered(x).square_sum, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms.input_norm().double(), x.double().norm(dim=0), rtol=1e-5, atol=0)


def test_a_dead_input_has_a_sum_of_exactly_zero() -> None:
    x = inputs(100, 40)
    x[:, 7] = 0
    for needs in (Needs.NORMS, Needs.GRAM):
        assert int((gathered(x, needs=needs).square_sum == 0).sum()) == 1


def test_sums_over_processes_are_sums_of_the_parts() -> None:
    x, dense = inputs(700, 30), inputs(700, 30, seed=9)
    first, second, whole = gathered(x[:300], dense[:300]), gathered(x[300:], dense[300:]), gathered(x, dense)
    for mine, theirs in zip(first.tensors(), second.tensors(), strict=True):
        mine += theirs
    torch.testing.assert_close(first.gram, whole.gram, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(first.lag, whole.lag, rtol=1e-4, atol=1e-1)
    torch.testing.assert_close(first.input_norm(), whole.input_norm())


def test_factors_are_forgotten_when_tokens_come() -> None:
    statistics = gathered(inputs(50, 8))
    statistics.cache["x"] = 1
    statistics.notes.append("x")
    statistics.update(inputs(50, 8))
    assert not statistics.cache and not statistics.notes


def test_memory_is_what_the_sums_take() -> None:
    for needs, inherit in ((Needs.NOTHING, False), (Needs.NORMS, False), (Needs.GRAM, False), (Needs.GRAM, True)):
        held = Statistics(33, needs, inherit=inherit).tensors()
        assert Statistics.memory(33, needs, inherit) == sum(t.numel() * t.element_size() for t in held)


def test_the_dense_inputs_belong_to_inherited_errors() -> None:
    with pytest.raises(ValueError, match="inherited"):
        Statistics(4, Needs.GRAM, inherit=True).update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="inherited"):
        Statistics(4, Needs.GRAM).update(torch.ones(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="Gram"):
        Statistics(4, Needs.NORMS, inherit=True)
