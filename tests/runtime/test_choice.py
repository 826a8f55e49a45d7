"""Which layers stay packed: the model is held against the committed measurements."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wanda.kernels.native import LEVELS
from wanda.kernels.packed import PackedMatrix
from wanda.runtime import choice
from wanda.runtime.choice import CACHE, LARGE, gains, kept_as_stored, without_gain

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def measured() -> list[dict[str, Any]]:
    """What is committed, and products in float32 with two-byte values on AVX-512, which follow from it.

    Their kernel is that of two-byte inputs, which are converted before it, so that its time is at most theirs; torch's
    is that of float32.
    """
    rows = [row for file in sorted(RESULTS.glob("layer_choice*.json")) for row in json.loads(file.read_text())]
    names = ("path", "torch", "sparsity", "shape", "tokens", "where")
    own = {
        (*(str(row[name]) for name in names), row["dtype"]): row
        for row in rows
        if row.get("computed", row["dtype"]) == row["dtype"]
    }
    for (*case, stored), row in own.items():
        if case[0] == "avx512" and stored != "float32":
            ratio = own[(*case, "float32")]["torch_us"] / row["packed_us"]
            for path in ("avx512", "avx512_bf16"):
                rows.append({**row, "path": path, "computed": "float32", "ratio": [ratio]})
    return rows


MEASURED = measured()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NOISE = 0.9  # of the same time; no more than what rounds differ by


def predicted(row: dict[str, object]) -> bool:
    stored = getattr(torch, str(row["dtype"]))
    computed = getattr(torch, str(row.get("computed", row["dtype"])))
    nbytes = math.prod(row["shape"]) * computed.itemsize  # type: ignore[call-overload]
    together = nbytes if row["where"] == "cached" else 2 * CACHE
    return gains(str(row["path"]), stored, computed, nbytes, 1 - float(str(row["sparsity"])), together)


def test_what_stays_packed_was_measured_to_gain() -> None:
    chosen = [row for row in MEASURED if row["tokens"] == 1 and predicted(row)]
    assert len(chosen) > 20 and {row["path"] for row in chosen} == {"avx2", "avx512", "avx512_bf16", "amx"}
    assert not [row for row in chosen if row["ratio"][0] < NOISE]
    assert sum(row["ratio"][0] for row in chosen) / len(chosen) > 1.5


@given(
    st.sampled_from(LEVELS),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(1, 1 << 30),
    st.floats(0, 1),
    st.integers(1, 1 << 34),
    st.floats(0, 1),
)
def test_more_zeros_and_a_larger_model_never_speak_against_packing(
    path: str, dtype: torch.dtype, wide: bool, nbytes: int, density: float, together: int, less: float
) -> None:
    types = dtype, torch.float32 if wide else dtype
    if gains(path, *types, nbytes, density, together):
        assert gains(path, *types, nbytes, density * less, together)
        assert gains(path, *types, nbytes, density, together + CACHE)
    assert not gains("portable", *types, nbytes, density, together)
    assert gains("avx512_bf16", torch.bfloat16, torch.bfloat16, nbytes, density, together)


@pytest.mark.parametrize("path", LEVELS)
def test_the_rule_is_asked_of_each_matrix(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    def asked(where: str, *types_and_sizes: object) -> bool:
        assert where == path
        return types_and_sizes in (
            (torch.float32, torch.float32, 4 * 64 * 4, 0.25, 8 * 100 * 2 + 4 * 64 * 4),
            (torch.bfloat16, torch.float32, 8 * 100 * 4, 0.5, 8 * 100 * 4 + 4 * 64 * 4),
        )

    half, float32 = torch.zeros(8, 100), torch.zeros(4, 64)
    half[:, ::2] = 1
    float32[0] = 1
    matrices = {"a": PackedMatrix.pack(half.bfloat16()), "b": PackedMatrix.pack(float32)}
    monkeypatch.setattr(choice, "level", lambda: LEVELS.index(path))
    monkeypatch.setattr(choice, "gains", asked)
    assert without_gain(matrices) == {"a"}
    assert without_gain(matrices, torch.float32) == {"b"}


@pytest.mark.parametrize("path", LEVELS)
def test_dense_matrices_are_kept_where_float32_would_be_twice_as_much(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(choice, "level", lambda: LEVELS.index(path))
    rows = LARGE // 256
    tensors = {
        "head": torch.empty(CACHE // 256, 64, dtype=torch.bfloat16, device="meta"),
        "other": torch.empty(rows, 64, dtype=torch.bfloat16, device="meta"),
        "half": torch.empty(rows, 64, dtype=torch.float16, device="meta"),
        "float": torch.empty(rows, 64, device="meta"),
        "small": torch.empty(rows - 1, 64, dtype=torch.bfloat16, device="meta"),
        "vector": torch.empty(64 * rows, dtype=torch.bfloat16, device="meta"),
        "fused": torch.empty(2, rows, 64, dtype=torch.bfloat16, device="meta"),
    }
    found = kept_as_stored(tensors, {}, torch.float32, speed=True)
    assert found == (set() if path == "portable" else {"head", "other", "half"})
    assert kept_as_stored(tensors, {}, torch.float32, speed=False) == {"head", "other", "half"}
    assert kept_as_stored(tensors, {}, torch.bfloat16, speed=False) == kept_as_stored(tensors, {}, None, True) == set()
    few = {key: tensors[key] for key in ("other", "half")}
    assert kept_as_stored(few, {}, torch.float32, speed=True) == set()  # they lie in the cache
