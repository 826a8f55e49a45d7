"""Selection against a stable sort, whichever way it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wanda.kernels import selection
from wanda.kernels.native import LEVELS, level, native
from wanda.kernels.selection import FEW, clear_lost, lowest, lowest_of_few

WAYS = ["torch", *LEVELS[: level() + 1]] if native() is not None else ["torch"]
COMPILED = WAYS[1:]

# ties, both zeros, subnormals, infinities, the largest and the smallest
ODD = [0.0, -0.0, 1.0, 1.0, -1.0, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38, float("inf"), float("-inf"), 1.0000001]


@contextlib.contextmanager
def taking(way: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if way == "torch":
            patch.setattr(selection, "native", lambda: None)
        else:
            patch.setattr(selection, "level", lambda: LEVELS.index(way))
        yield


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with taking(request.param):
        yield request.param


def sorted_lowest(scores: Tensor, counts: list[int]) -> Tensor:
    """By the definition: a stable ascending sort of every row, -0.0 equal to 0.0, NaN last."""
    order = np.argsort(scores.numpy() + np.float32(0), axis=1, kind="stable")
    marked = np.zeros(scores.shape, dtype=bool)
    for row, count in enumerate(counts):
        marked[row, order[row, :count]] = True
    return torch.from_numpy(marked)


def drawn(groups: int, n: int, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "odd":
        return torch.tensor(ODD)[torch.randint(len(ODD), (groups, n), generator=generator)]
    if kind == "few":
        return torch.randint(3, (groups, n), generator=generator).float()
    if kind == "equal":
        return torch.full((groups, n), 0.5)
    return torch.randn(groups, n, generator=generator) ** 3


@pytest.mark.parametrize("path", WAYS)
@settings(max_examples=60)
@given(
    groups=st.integers(1, 7),
    n=st.integers(1, 70),
    kind=st.sampled_from(["normal", "odd", "few", "equal"]),
    seed=st.integers(0, 2**20),
    spare=st.integers(0, 2),
    data=st.data(),
)
def test_lowest_is_a_stable_sort(
    path: str, groups: int, n: int, kind: str, seed: int, spare: int, data: st.DataObject
) -> None:
    scores = drawn(groups, n + spare, kind, seed)[:, :n]  # rows that do not follow each other without a gap
    counts = data.draw(st.lists(st.integers(0, n), min_size=groups, max_size=groups))
    with taking(path):
        assert torch.equal(lowest(scores, counts), sorted_lowest(scores, counts))
        assert torch.equal(lowest(scores, counts[0]), sorted_lowest(scores, [counts[0]] * groups))
        across = scores.T.contiguous().T  # columns that follow each other
        assert torch.equal(lowest(across, counts), sorted_lowest(scores, counts))
        if n <= FEW:
            assert torch.equal(lowest_of_few(scores, counts[0]), sorted_lowest(scores, [counts[0]] * groups))


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("kind", ["normal", "odd", "few", "equal", "sorted", "one low"])
def test_a_large_group_is_a_stable_sort_too(way: str, kind: str) -> None:
    n = 50_000  # narrowed down by a sample first
    scores = drawn(1, n, kind, 3)
    if kind == "sorted":
        scores = scores.sort(dim=1).values
    if kind == "one low":
        scores = torch.cat([torch.full((1, n - 1), 2.0), torch.ones(1, 1)], dim=1)
    for count in (0, 1, 2, n // 100, n // 3, n // 2, n - 1, n):
        assert torch.equal(lowest(scores, count), sorted_lowest(scores, [count])), count


@pytest.mark.parametrize("way", COMPILED, indirect=True)
def test_nan_ranks_last(way: str) -> None:
    scores = torch.tensor([[float("nan"), 1.0, -float("nan"), float("inf"), -float("inf")]])
    for count in range(6):
        assert torch.equal(lowest(scores, count), sorted_lowest(scores, [count]))


@pytest.mark.skipif(not COMPILED, reason="the extension is not compiled")
def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = drawn(700, 333, "normal", 0)
    marks = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        marks.append(lowest(scores, 100))
    assert torch.equal(marks[0], marks[1]) and torch.equal(marks[0], marks[2])


@pytest.mark.parametrize("way", ["torch", *COMPILED[:1]], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["whole", "rows with a gap", "transposed", "every other"])
def test_clearing_keeps_the_other_bits(way: str, dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, n = 37, 41
    memory = torch.randn(2 * n, 2 * n, generator=generator).to(dtype)
    memory[3, 5], memory[4, 6] = -0.0, float("inf")
    values = {
        "whole": memory[:rows, :n].clone(),
        "rows with a gap": memory[:rows, 1 : n + 1],
        "transposed": memory[:n, :rows].T,
        "every other": memory[:rows, ::2],
    }[layout]
    mask = torch.rand(rows, n, generator=generator) < 0.5
    before, around = values.clone(), memory.clone()
    assert clear_lost(values, mask) is values
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    expected = np.where(mask.numpy(), before.contiguous().view(bits).numpy(), 0)
    assert np.array_equal(values.contiguous().view(bits).numpy(), expected)
    assert int((memory != around).sum()) <= int((~mask).sum())
