"""Products over tokens against float64, whichever way they are taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanda.kernels import products
from wanda.kernels.native import LEVELS, level, native
from wanda.kernels.products import add_product


def needs(path: str) -> pytest.MarkDecorator:
    there = native() is not None and level() >= LEVELS.index(path)
    return pytest.mark.skipif(not there, reason=f"the kernel needs {path}")


NATIVE = [pytest.param(path, marks=needs(path)) for path in ("avx512_bf16", "amx")]


@pytest.mark.parametrize("way", ["torch", *NATIVE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@settings(max_examples=40)
@given(
    tokens=st.integers(1, 1300),
    m=st.integers(1, 150),
    n=st.integers(1, 150),
    upper=st.booleans(),
    spare=st.integers(0, 3),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**20),
)
def test_products_agree_with_float64(
    way: str, dtype: torch.dtype, tokens: int, m: int, n: int, upper: bool, spare: int, threads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(tokens, m + spare, generator=generator).to(dtype)[:, :m]
    b = a if upper else torch.randn(tokens, n + spare, generator=generator).to(dtype)[:, :n]
    before = torch.randn(m, b.shape[1] + spare, generator=generator)
    out = before.clone()
    known = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if way == "torch":
            patch.setattr(products, "multiplies_bfloat16", lambda: False)
        else:
            patch.setattr(products, "level", lambda: LEVELS.index(way))
        torch.set_num_threads(threads)
        try:
            add_product(out[:, : b.shape[1]], a, b, upper)
        finally:
            torch.set_num_threads(known)
    exact = before[:, : b.shape[1]].double() + a.double().T @ b.double()
    size = before[:, : b.shape[1]].double().abs() + a.double().abs().T @ b.double().abs()
    error = (out[:, : b.shape[1]].double() - exact).abs()  # of a float32 sum, which grows with the tokens
    assert ((error.triu() if upper else error) <= 2**-17 * size).all()
    assert torch.equal(out[:, b.shape[1] :], before[:, b.shape[1] :])  # nothing beside the matrix is touched


@pytest.mark.parametrize("way", NATIVE)
def test_the_number_of_threads_changes_no_bit(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "level", lambda: LEVELS.index(way))
    x = torch.randn(700, 333, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = torch.zeros(333, 333)
        add_product(out, x, x, upper=True)
        sums.append(out.triu())
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
