"""Every kernel path against dense float64 products, and the structural check that keeps them in bounds."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wanda.errors import RunError
from wanda.kernels import native as natives
from wanda.kernels import packed as kernels
from wanda.kernels.packed import COLUMNS, PackedMatrix, dense_multiply

KERNELS = Path(kernels.__file__).parent
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF_ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}
MODULE = natives.native()
TILED = ("avx512_bf16", "amx")  # with matrix products of their own for bfloat16
PATHS = [*natives.LEVELS[: MODULE.best_level() + 1], "torch"] if MODULE is not None else ["torch"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(request.param, monkeypatch)
    return request.param


def force(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "torch":
        monkeypatch.setattr(kernels, "native", lambda: None)
    else:
        monkeypatch.setattr(kernels, "level", lambda: natives.LEVELS.index(path))


def sparse(out: int, width: int, share: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(out, width, generator=generator)
    return torch.where(torch.rand(out, width, generator=generator) < share, dense, 0).to(dtype)


def assert_product(found: Tensor, weight: Tensor, x: Tensor, bias: Tensor | None) -> None:
    """Within one rounding of the exact product plus the error of summing in float32."""
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = HALF_ULP[x.dtype] * exact.abs() + 2**-20 * size + 2**-24
    assert found.dtype == x.dtype
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 64, 65, 576, 1100])
def test_products_of_all_widths_and_columns(path: str, dtype: torch.dtype, width: int) -> None:
    """In the matrix's own type and, whatever that is, in float32."""
    for out, share in ((1, 1.0), (50, 0.5), (13, 0.1), (7, 0.0)):
        weight = sparse(out, width, share, dtype)
        if out > 2:
            weight[2] = 0  # an empty row among others
        packed = PackedMatrix.pack(weight)
        assert packed.fault() is None
        for computed in {dtype, torch.float32}:
            bias = torch.randn(out).to(computed)
            for columns in (1, 2, 3, 5, 7, 12, 16, 50, 131):
                x = torch.randn(columns, width).to(computed)
                assert_product(packed.multiply(x), weight, x, None)
                assert_product(packed.multiply(x, bias), weight, x, bias)
                if path in TILED and dtype == computed == torch.bfloat16:
                    assert_product(dense_multiply(weight, x, bias), weight, x, bias)


def test_products_of_more_than_a_task_takes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows, inputs and tokens than any kernel holds at once, none of them a multiple of what it takes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # for more threads, AMX takes more tokens at once
    weight = sparse(301, 1347, 0.5, torch.bfloat16)
    x, bias = torch.randn(2099, 1347).bfloat16(), torch.randn(301).bfloat16()
    assert_product(PackedMatrix.pack(weight).multiply(x, bias), weight, x, bias)
    if path in TILED:
        assert_product(dense_multiply(weight, x, bias), weight, x, bias)


def test_shapes_without_elements(path: str) -> None:
    for out, width in ((0, 5), (5, 0), (0, 0)):
        packed = PackedMatrix.pack(torch.zeros(out, width, dtype=torch.bfloat16))
        assert packed.fault() is None
        assert packed.dense().shape == (out, width)
        for columns in (1, 20):
            assert (
                packed.multiply(torch.zeros(columns, width, dtype=torch.bfloat16)).tolist() == [[0.0] * out] * columns
            )
    assert PackedMatrix.pack(sparse(8, 64, 0.5, torch.float32)).multiply(torch.zeros(2, 0, 64)).shape == (2, 0, 8)


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 9),
    st.integers(1, 150),
    st.sampled_from([0, 5, 50, 95, 100]),
    st.integers(0),
)
@settings(max_examples=60)
def test_packing_keeps_every_bit(dtype: torch.dtype, out: int, width: int, percent: int, seed: int) -> None:
    """Random bit patterns: NaN payloads, infinities, subnormals and -0.0 come back as they were, on every path."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    bits = torch.randint(0, 256, (out, width * dtype.itemsize), dtype=torch.uint8, generator=generator)
    words = bits.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    words[torch.rand(out, width, generator=generator) * 100 >= percent] = 0
    if percent:
        words[0, 0] = -1 << (8 * dtype.itemsize - 1)  # -0.0
    weight = words.view(dtype)
    for path in PATHS:
        with pytest.MonkeyPatch.context() as patch:
            force(path, patch)
            packed = PackedMatrix.pack(weight)
            assert packed.fault() is None
            assert packed.survivors == int((words != 0).sum())
            assert torch.equal(packed.dense().view(torch.uint8), weight.contiguous().view(torch.uint8))
            assert torch.equal(packed.dense(1, out).view(torch.uint8), weight[1:].contiguous().view(torch.uint8))
            torch.testing.assert_close(
                packed.dense(dtype=torch.float32), weight.float(), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_by_number(path: str, dtype: torch.dtype) -> None:
    weight = sparse(40, 70, 0.9, dtype)
    packed = PackedMatrix.pack(weight)
    for indices in (torch.tensor([[3, 39, 3], [0, 1, 1]]), torch.tensor(7), torch.zeros(2, 0, dtype=torch.int64)):
        assert torch.equal(packed.rows(indices), torch.nn.functional.embedding(indices, weight))
        assert torch.equal(packed.rows(indices, torch.float32), weight.float()[indices])
    for wrong in ([0, 40], [-1, 2]):
        with pytest.raises(IndexError, match="matrix of 40"):
            packed.rows(torch.tensor(wrong))


def test_any_number_of_threads_gives_the_same_bits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedMatrix.pack(sparse(700, 640, 0.5, torch.bfloat16))
    xs = [torch.randn(columns, 640).bfloat16() for columns in (1, 6, 40, 131)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads, pool in ((1, natives.pool()), (2, natives.pool()), (7, natives.pool()), (3, 0)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(kernels, "pool", lambda pool=pool: pool)
            results.append([packed.multiply(x) for x in xs])
    finally:
        torch.set_num_threads(before)
    own = [path != "torch" and (len(x) <= COLUMNS or path != "portable") for x in xs]
    for other in results:
        for ours, found, first, x in zip(own, other, results[0], xs, strict=True):
            assert_product(found, packed.dense(), x, None)
            assert not ours or torch.equal(found, first)  # torch's own products may split their sums by thread


def test_structure_that_lies_is_found(path: str) -> None:
    good = PackedMatrix.pack(sparse(20, 100, 0.5, torch.bfloat16))

    def changed(part: str, at: int, value: int) -> PackedMatrix:
        tensor = getattr(good, part).clone()
        tensor.view({"mask": torch.int64, "offsets": torch.int32}[part])[at] = value
        return dataclasses.replace(good, **{part: tensor})

    first = int(good.offsets.view(torch.int32)[1])
    word = int(good.mask.view(torch.int64)[6])
    assert good.fault() is None
    faults = {
        "row 0": [changed("offsets", 0, 1), changed("offsets", 1, first + 1), changed("offsets", 1, -1)],
        "row 3": [changed("mask", 6, word ^ 1), changed("mask", 6, word ^ 1 << 40)],
        "row 19": [dataclasses.replace(good, values=good.values[: good.survivors + 31])],
    }
    for where, cases in faults.items():
        assert all(where in (case.fault() or "") for case in cases)
    beyond = changed("mask", 3, int(good.mask.view(torch.int64)[3]) | 1 << 36)  # column 100 of 100
    assert "row 1" in (beyond.fault() or "")
    for short in ({"mask": good.mask[:39]}, {"offsets": good.offsets[:20]}, {"values": good.values[:10]}):
        assert "too short" in (dataclasses.replace(good, **short).fault() or "")


def test_what_a_kernel_cannot_take_is_refused() -> None:
    packed = PackedMatrix.pack(sparse(8, 64, 0.5, torch.bfloat16))
    for x in (torch.zeros(1, 64).half(), torch.zeros(1, 63).bfloat16(), torch.zeros(1, 64, device="meta").bfloat16()):
        with pytest.raises(RunError, match="cannot take"):
            packed.multiply(x)
    for computed, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        with pytest.raises(RunError, match="bias"):
            packed.multiply(torch.zeros(1, 64, dtype=computed), torch.zeros(8, dtype=other))
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    for bias, named in ((torch.zeros(8, device="meta"), "on meta"), (torch.zeros(7), r"bias \(7,\)")):
        with pytest.raises(RunError, match=named):
            packed.multiply(x, bias.bfloat16())


SKIPPING = [path for path in PATHS if path not in ("portable", "torch")]


@pytest.mark.parametrize("name", SKIPPING)
def test_zeros_are_skipped_where_few_enough_weights_survive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100: up to 70 with AVX2, 60 above; the one threshold decides in C, for few tokens, and here, for many."""
    force(name, monkeypatch)
    most = 70 if name == "avx2" else 60
    for survivors, expanded in ((most, False), (most + 1, True)):
        weight = torch.zeros(100)
        weight[:survivors] = torch.randn(survivors)
        weight = weight.reshape(10, 10)
        packed = PackedMatrix.pack(weight)
        pays = MODULE is not None and MODULE.packed_skipping_pays(*packed._description, natives.LEVELS.index(name))
        assert pays is not expanded
        with pytest.MonkeyPatch.context() as patch:
            dense = Mock(side_effect=packed.dense)
            patch.setattr(PackedMatrix, "dense", dense)
            for columns in (13, 17):
                x = torch.randn(columns, 10)
                assert_product(packed.multiply(x), weight, x, None)
        assert dense.called is expanded


@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_inputs_do_not_meet_removed_weights(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(name, monkeypatch)
    weight = sparse(70, 100, 0.5, dtype)
    weight[::2, 3] = 0
    weight[1::2, 3] = 1
    for value in (torch.inf, torch.nan):
        x = torch.randn(131, 100)
        x[:, 3] = value
        found = PackedMatrix.pack(weight).multiply(x)
        without = weight.clone()
        without[:, 3] = 0
        assert_product(found[:, ::2], without[::2], x.nan_to_num(posinf=0), None)
        assert not found[:, 1::2].isfinite().any()


@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_beyond_the_type_are_what_torch_makes_of_them(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties, overflow, subnormals, infinity and NaN, rounded from float32: one survivor a row copies its input."""
    force(name, monkeypatch)
    x = torch.tensor([1.0, -3e38, 65519.0, 65520.0, 1e-7, 2**-24, -0.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
    x = x[:, None].expand(10, 16).repeat(13, 1).contiguous()
    bias = torch.full((16,), 0.00390625).to(dtype)
    weight = torch.zeros(16, 16, dtype=dtype).fill_diagonal_(1.0)
    packed = PackedMatrix.pack(weight)
    if name in TILED and dtype == torch.bfloat16:
        x = x[x[:, 0].isfinite()]  # zero times infinity is NaN there
    expected = (x.float() + bias.float()).to(dtype)
    torch.testing.assert_close(packed.multiply(x, bias), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", PATHS)
def test_the_dense_kernel_is_refused_where_there_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(name, monkeypatch)
    weight, x = torch.ones(8, 64), torch.ones(1, 64)
    with pytest.raises(RunError, match="no dense kernel"):
        dense_multiply(weight, x)
    if name not in TILED:
        with pytest.raises(RunError, match="no dense kernel"):
            dense_multiply(weight.bfloat16(), x.bfloat16())


def test_columns_that_are_not_contiguous() -> None:
    weight = sparse(40, 128, 0.5, torch.bfloat16)
    packed = PackedMatrix.pack(weight)
    wide = torch.randn(3, 400, 20).bfloat16()
    for x in (wide[:, 5:133, :4].transpose(1, 2), wide.reshape(60, 400)[::3, 7:135]):
        assert_product(packed.multiply(x).reshape(-1, 40), weight, x.reshape(-1, 128), None)


def run(code: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, natives.VARIABLE: path}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses_the_path() -> None:
    code = "from wanda.kernels.native import level, native; print(native() and level())"
    if MODULE is not None:
        assert run(code, "portable").stdout.split() == ["0"]
    assert run(code, "torch").stdout.split() == ["None"]
    assert "portable" in run(code, "portible").stderr


FEATURES = {  # names that __builtin_cpu_supports takes in GCC 9 and clang 14, which the kernels were compiled with
    *("avx2", "fma", "popcnt", "bmi", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512vbmi2", "avx512bf16"),  # where the compiler has the intrinsics, GCC from 10 on
}


def test_the_compiler_is_asked_for_names_that_old_ones_know() -> None:
    """A name that one does not know is an error there, and the whole extension would be missing."""
    asked: set[str] = set()
    for file in KERNELS.glob("*.[ch]"):
        asked |= set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', file.read_text(encoding="utf-8")))
    assert "avx2" in asked and asked <= FEATURES


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_every_kernel_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} here")
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        pytest.skip("there are no headers of Python here")
    flags = ["-c", "-O0", "-std=c11", "-D_GNU_SOURCE", "-DPy_LIMITED_API=0x030b0000", "-Wall", "-Wextra", "-Werror"]
    sources = [str(file) for file in sorted(KERNELS.glob("*.c"))]
    command = [compiler, *flags, "-isystem", include, *sources]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert len(list(tmp_path.glob("*.o"))) == len(sources)


@pytest.mark.skipif(
    MODULE is None or platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="Linux tells what an x86 processor has",
)
def test_the_best_path_is_what_the_system_says_the_processor_has() -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).partition(":")[2].split())
    needed = (
        {"avx2", "fma", "f16c", "popcnt", "bmi1", "bmi2"},
        {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        {"avx512_vbmi2", "avx512_bf16"},
        {"amx_tile", "amx_bf16"},
    )
    expected = 0
    for names in needed:
        if not names <= flags:
            break
        expected += 1
    found = MODULE.best_level()
    missing = [(2, 3), (2, 4), (3, 4)]  # by a compiler without them, the last one without the system's permission too
    assert found == expected or (found, expected) in missing


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to compile the kernels with sanitizers")
def test_kernels_under_the_sanitizers(tmp_path: Path) -> None:
    sources = [str(file) for file in KERNELS.glob("*.c") if not file.name.endswith("module.c")]
    program = tmp_path / "sanitize"
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g", "-std=c11", "-D_GNU_SOURCE"]
    harness = str(Path(__file__).with_name("sanitize.c"))
    command = ["gcc", *flags, f"-I{KERNELS}", harness, *sources, "-o", str(program), "-lm", "-pthread"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and "san" in built.stderr and "cannot find" in built.stderr:
        pytest.skip("gcc has no sanitizer libraries here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
