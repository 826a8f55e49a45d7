"""Sums of squares of columns against float64, whichever way they are taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanda.kernels import columns
from wanda.kernels.columns import square_sum
from wanda.kernels.native import LEVELS, level, native

WAYS = ["torch", *LEVELS[: level() + 1]] if native() is not None else ["torch"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@settings(max_examples=30)
@given(
    rows=st.integers(0, 2100),
    n=st.one_of(st.integers(1, 70), st.integers(500, 1100)),
    spare=st.integers(0, 3),
    across=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_sums_agree_with_float64(
    way: str, dtype: torch.dtype, rows: int, n: int, spare: int, across: bool, seed: int
) -> None:
    x = torch.randn(rows, n + spare, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, :n]
    x = x.T.contiguous().T if across else x
    with pytest.MonkeyPatch.context() as patch:
        if way == "torch":
            patch.setattr(columns, "native", lambda: None)
        else:
            patch.setattr(columns, "level", lambda: LEVELS.index(way))
        sums = square_sum(x)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), x.double().square().sum(dim=0), rtol=3e-6, atol=0)


@pytest.mark.skipif(native() is None, reason="the extension is not compiled")
def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1500, 1700, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sums.append(square_sum(x))
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
