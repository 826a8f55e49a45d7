"""The packed checkpoint: lossless, small, readable from its description alone, refused when damaged."""

from __future__ import annotations

import importlib.util
import json
import random
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import tiny_llama
from wanda.checkpoint import packed as module
from wanda.checkpoint.packed import MANIFEST, manifest_checksum, open_packed, pack, unpack
from wanda.checkpoint.tensors import read_header
from wanda.errors import ConfigurationError, MissingExtraError, RunError, WandaError
from wanda.kernels import packed as kernels

DATA = "packed-00001.safetensors"


def prune(weight: Tensor, sparsity: float) -> Tensor:
    gone = weight.float().abs().argsort(dim=1)[:, : int(weight.shape[1] * sparsity)]
    return weight.scatter(1, gone, 0.0)


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama",  "architectures": ["LlamaForCausalLM"]}')
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sparse matrices of different types, a dense one, a vector, a 3-D tensor, integers; odd bits among them."""
    torch.manual_seed(0)
    odd = prune(torch.randn(40, 100), 0.6).bfloat16()
    odd.view(torch.int16)[0, :4] = torch.tensor([-32768, 0x7FC1, -1, 1], dtype=torch.int16)  # -0.0, NaNs, subnormal
    tensors = {
        "a.weight": odd,
        "b.weight": prune(torch.randn(64, 128), 0.5).half(),
        "c.weight": prune(torch.randn(33, 65), 0.9),
        "dense.weight": torch.randn(40, 40).bfloat16(),
        "few.weight": prune(torch.randn(40, 64), 0.1).bfloat16(),
        "norm.weight": torch.zeros(17),
        "experts": torch.zeros(2, 4, 8),
        "flags": torch.tensor([True, False, True]),
        "position_ids": torch.arange(5),
    }
    return write(tmp_path_factory.mktemp("sparse") / "model", tensors)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "compressed"])
def packed(request: pytest.FixtureRequest, sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(str(sparse), out, compress=request.param)
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def raw(tensor: Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and raw(a[k]) == raw(b[k]) for k in a
    )


def test_unpacking_gives_every_bit_back(sparse: Path, packed: Path, tmp_path: Path) -> None:
    opened = open_packed(packed)
    assert set(opened.matrices) == {"a.weight", "b.weight", "c.weight"}
    before = load_file(sparse / "model.safetensors")
    assert same(before, opened.tensors | {key: matrix.dense() for key, matrix in opened.matrices.items()})
    unpack(packed, tmp_path / "again")
    assert same(before, load_file(tmp_path / "again" / "model.safetensors"))
    assert not (tmp_path / "again" / MANIFEST).exists()


def test_the_folder_says_what_it_is_and_is_no_ordinary_checkpoint(sparse: Path, packed: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert (packed / "config.json").read_bytes() == (sparse / "config.json").read_bytes()
    assert sorted(file.name for file in packed.iterdir()) == ["config.json", DATA, MANIFEST]
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_reader_written_from_the_description(sparse: Path, tmp_path: Path) -> None:
    """docs/packed-format.md in numpy and struct, without this package."""
    pack(str(sparse), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    raw = (tmp_path / "out" / manifest["files"][0]).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, start = json.loads(raw[8 : 8 + length]), 8 + length
    assert start % 64 == 0

    def part(key: str, kind: str) -> np.ndarray[Any, Any]:
        begin, end = header[key]["data_offsets"]
        assert begin % 64 == 0 and end % 64 == 0
        assert manifest["tensors"][key]["checksum"] == xxhash.xxh3_64_hexdigest(raw[start + begin : start + end])
        return np.frombuffer(raw[start + begin : start + end], kind)

    before = load_file(sparse / "model.safetensors")
    for key, description in manifest["matrices"].items():
        out, width = description["shape"]
        kind = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}[description["dtype"]]
        mask, offsets, values = part(f"{key}.mask", "<u8"), part(f"{key}.offsets", "<u4"), part(f"{key}.values", kind)
        words = (width + 63) // 64
        dense = np.zeros((out, width), kind)
        for i in range(out):
            at = int(offsets[i])
            for j in range(width):
                if int(mask[i * words + j // 64]) >> j % 64 & 1:
                    dense[i, j] = values[at]
                    at += 1
            assert at == offsets[i + 1]
        assert offsets[out] == description["survivors"] and len(values) >= description["survivors"] + 32
        assert dense.tobytes() == before[key].view(torch.uint8).numpy().tobytes()


def test_sizes_at_half_sparsity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {
        f"{i}.weight": prune(torch.randn(300, width) * 0.02, 0.5).bfloat16() for i, width in enumerate((2048, 576))
    }
    source = write(tmp_path / "model", weights)
    plain = pack(str(source), tmp_path / "plain")
    assert plain.packed_bytes <= 0.57 * plain.dense_bytes
    small = pack(str(source), tmp_path / "small", compress=True)
    assert small.folder_after <= 0.42 * small.folder_before


def test_summary_and_what_stays_dense(sparse: Path, tmp_path: Path) -> None:
    (sparse / "pytorch_model.bin").write_bytes(b"x")
    try:
        summary = pack(str(sparse), tmp_path / "out")
    finally:
        (sparse / "pytorch_model.bin").unlink()
    assert summary.packed == 3 and summary.left_dense == ["few.weight"] and summary.left_out == ["pytorch_model.bin"]
    entries, _ = read_header(tmp_path / "out" / DATA)
    assert summary.folder_after == sum(entry.nbytes for entry in entries.values()) < summary.folder_before


def test_safetensors_files_that_no_index_names_are_named(sparse: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in sparse.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    save_file({"x": torch.ones(2)}, source / "adapter.safetensors")
    (source / "original").mkdir()
    assert pack(str(source), tmp_path / "packed").left_out == ["adapter.safetensors", "original"]
    save_file({"x": torch.ones(2)}, tmp_path / "packed" / "adapter.safetensors")
    assert unpack(tmp_path / "packed", tmp_path / "again")[1] == ["adapter.safetensors"]
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]


def test_code_that_config_names_has_to_be_there(sparse: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in sparse.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    names = {
        "AutoConfig": "setup_own.Config",
        "AutoTokenizer": [None, "words.Own"],
        "AutoModel": "far/away--elsewhere.M",
    }
    (source / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    with pytest.raises(ConfigurationError, match=r"code of its own \(setup_own\.py, words\.py\)"):
        pack(str(source), tmp_path / "packed")
    (source / "setup_own.py").write_text("a = 1")
    (source / "words.py").write_text("b = 2")
    pack(str(source), tmp_path / "packed")
    assert (tmp_path / "packed" / "words.py").read_text() == "b = 2"


def test_several_files(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 9000)
    pack(str(sparse), tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    unpack(tmp_path / "packed", tmp_path / "again")
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert len(files) > 1 and {file.name for file in files} == set(index["weight_map"].values())
    assert same(load_file(sparse / "model.safetensors"), {k: v for file in files for k, v in load_file(file).items()})


def test_a_whole_model_on_the_torch_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, whether the kernels are there or not."""
    source = tiny_llama(tmp_path / "model", torch.bfloat16)
    weights = load_file(source / "model.safetensors")
    save_file({k: prune(v, 0.6) if "proj" in k else v for k, v in weights.items()}, source / "model.safetensors")
    pack(str(source), tmp_path / "a")
    monkeypatch.setattr(kernels, "native", lambda: None)
    pack(str(source), tmp_path / "b")
    assert (tmp_path / "a" / DATA).read_bytes() == (tmp_path / "b" / DATA).read_bytes()
    unpack(tmp_path / "b", tmp_path / "again")
    assert same(load_file(source / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors"))


def test_requests_that_are_refused(sparse: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="not empty"):
        pack(str(sparse), full)
    with pytest.raises(ConfigurationError, match="not empty"):
        unpack(packed, full)
    with pytest.raises(ConfigurationError, match="packed already"):
        pack(str(packed), tmp_path / "twice")
    with pytest.raises(ConfigurationError, match="no packed checkpoint"):
        unpack(sparse, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="input itself"):
        pack(str(sparse), sparse, overwrite=True)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"wanda-prune\[compress\]"):
        pack(str(sparse), tmp_path / "out", compress=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["full"]
    pack(str(sparse), full, overwrite=True)
    assert not (full / "notes.txt").exists() and (full / MANIFEST).exists()


def test_a_failure_on_the_way_leaves_nothing(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(RunError, match="disk is full"):
        pack(str(sparse), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def copy(packed: Path, to: Path) -> tuple[dict[str, Any], bytearray]:
    to.mkdir()
    for file in packed.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return json.loads((to / MANIFEST).read_text()), bytearray((to / DATA).read_bytes())


def edit(folder: Path, key: str, change: Any, repair: bool) -> None:
    """Apply `change` to the bytes of one tensor; `repair` makes its checksum right again."""
    entry = read_header(folder / DATA)[0][key]
    data = bytearray((folder / DATA).read_bytes())
    piece = data[entry.offset : entry.offset + entry.nbytes]
    change(piece)
    data[entry.offset : entry.offset + entry.nbytes] = piece
    (folder / DATA).write_bytes(data)
    if repair:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["tensors"][key]["checksum"] = xxhash.xxh3_64_hexdigest(bytes(piece))
        manifest["checksum"] = manifest_checksum(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))


def flip(piece: bytearray) -> None:
    piece[5] ^= 4


def lie(piece: bytearray) -> None:
    piece[4:8] = struct.pack("<I", 0xFFFFFFF0)


@pytest.fixture(scope="module")
def plain(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    pack(str(sparse), out)
    return out


@pytest.mark.parametrize(
    ("key", "change", "repair", "match"),
    [
        ("a.weight.mask", flip, False, r"a\.weight\.mask is damaged: its checksum"),
        ("a.weight.values", flip, False, r"a\.weight\.values is damaged"),
        ("norm.weight", flip, False, r"norm\.weight is damaged"),
        ("a.weight.mask", flip, True, r"a\.weight is damaged.* do not agree in row 0"),
        ("b.weight.offsets", lie, True, r"b\.weight is damaged.* do not agree in row 0"),
    ],
)
def test_damaged_tensors(plain: Path, tmp_path: Path, key: str, change: Any, repair: bool, match: str) -> None:
    copy(plain, tmp_path / "bad")
    edit(tmp_path / "bad", key, change, repair)
    with pytest.raises(RunError, match=match):
        open_packed(tmp_path / "bad")


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (lambda m: m.update(version=2), ConfigurationError, "version 2 .*upgrade"),
        (lambda m: m.update(format="else"), RunError, "does not describe"),
        (lambda m: m.pop("tensors"), RunError, "tensors is missing"),
        (lambda m: m["tensors"].pop("norm.weight"), RunError, r"norm\.weight is not listed"),
        (lambda m: m["matrices"]["a.weight"].update(shape=[41, 100]), RunError, r"a\.weight is damaged"),
        (lambda m: m["matrices"]["a.weight"].update(shape=[40, 99]), RunError, r"a\.weight is damaged"),
        (lambda m: m["matrices"]["a.weight"].update(shape=[40, -1]), RunError, r"a\.weight is damaged"),
        (lambda m: m["matrices"]["a.weight"].update(dtype="F32"), RunError, r"a\.weight is damaged"),
        (lambda m: m["matrices"]["a.weight"].update(survivors=1), RunError, r"a\.weight is damaged"),
        (lambda m: m["matrices"].update(d={"dtype": "BF16", "shape": [1, 1], "survivors": 1}), RunError, "missing"),
        (lambda m: m.update(files=["../x"]), RunError, "outside"),
        (lambda m: m.update(files=[DATA, DATA]), RunError, "does not belong"),
        (lambda m: m.update(files=["absent.safetensors"]), RunError, r"absent\.safetensors"),
        (lambda m: m.update(files=[".."]), RunError, "cannot be read"),
        (lambda m: m.update(files=["a\0b"]), RunError, r"a\\x00b' cannot be read"),
        (lambda m: m.update(files=["\ud800"]), RunError, r"\\ud800' cannot be read"),
        (lambda m: m.update(version=0), RunError, "version"),
        (lambda m: m["matrices"]["a.weight"].update(shape=[0, 2**64]), RunError, r"a\.weight is damaged"),
        (lambda m: m["matrices"]["a.weight"].update(shape=[2**64, 0]), RunError, r"a\.weight is damaged"),
        (lambda m: m["matrices"]["a.weight"].update(shape=[2**70, 2**70]), RunError, r"a\.weight is damaged"),
        (lambda m: m["matrices"]["a.weight"].update(survivors=10**30), RunError, r"a\.weight is damaged"),
        (lambda m: m["tensors"].update({"norm.weight": None}), RunError, r"norm\.weight is not of the type"),
        (lambda m: m["tensors"]["norm.weight"].pop("checksum"), RunError, r"norm\.weight is damaged"),
    ],
)
def test_manifests_that_lie(plain: Path, tmp_path: Path, change: Any, kind: type[WandaError], match: str) -> None:
    manifest, _ = copy(plain, tmp_path / "bad")
    change(manifest)
    (tmp_path / "bad" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(WandaError):  # already because the manifest's own checksum is wrong
        open_packed(tmp_path / "bad")
    manifest["checksum"] = manifest_checksum(manifest)
    (tmp_path / "bad" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(kind, match=match):
        open_packed(tmp_path / "bad")


@pytest.mark.parametrize(
    ("key", "change", "listed"),
    [
        ("dense.weight", {"dtype": "F16"}, False),  # as many bytes
        ("dense.weight", {"shape": [20, 80]}, False),
        ("norm.weight", {"shape": [17, 1]}, False),
        ("experts", {"shape": [8, 8]}, False),
        ("flags", {"dtype": "U8"}, False),
        ("a.weight.values", {"dtype": "F16"}, False),
        ("a.weight.values", {"dtype": "F16"}, True),
        ("b.weight.mask", {"dtype": "I64"}, True),
        ("norm.weight", {"shape": [0, 10**30], "data_offsets": [0, 0]}, True),
        ("norm.weight", {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, True),
        ("norm.weight", {"shape": [17.0]}, True),
        ("norm.weight", {"shape": "17"}, True),
    ],
)
def test_headers_that_lie(plain: Path, tmp_path: Path, key: str, change: dict[str, Any], listed: bool) -> None:
    """Type and shape are bound to the manifest, which lists the lie in some of the cases."""
    manifest, data = copy(plain, tmp_path / "bad")
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[key].update(change)
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % 64)
    (tmp_path / "bad" / DATA).write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])
    if listed:
        said = manifest["tensors"][key]
        said.update({name: header[key][name] for name in ("dtype", "shape")})
        if "data_offsets" in change:
            said["checksum"] = xxhash.xxh3_64_hexdigest(b"")
        manifest["checksum"] = manifest_checksum(manifest)
        (tmp_path / "bad" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=key.removesuffix(".values").removesuffix(".mask")):
        open_packed(tmp_path / "bad")


def test_the_manifest_lists_type_and_shape_of_every_tensor(packed: Path) -> None:
    from safetensors import safe_open

    listed = json.loads((packed / MANIFEST).read_text())["tensors"]
    with safe_open(packed / DATA, framework="pt") as file:
        found = {key: (file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()) for key in listed}
        assert set(file.keys()) == set(listed)
    assert {key: (said["dtype"], said["shape"]) for key, said in listed.items()} == found


def test_files_cut_short(packed: Path, tmp_path: Path) -> None:
    _, data = copy(packed, tmp_path / "bad")
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "bad" / DATA).write_bytes(data[:length])
        with pytest.raises(RunError, match=DATA):
            open_packed(tmp_path / "bad")
    (tmp_path / "bad" / DATA).write_bytes(data)
    open_packed(tmp_path / "bad")
    text = (tmp_path / "bad" / MANIFEST).read_bytes()
    for broken in (text[:-9], b"", b"[" * 100_000, b"\xff" * 9, b"[]"):
        (tmp_path / "bad" / MANIFEST).write_bytes(broken)
        with pytest.raises(RunError, match=MANIFEST):
            open_packed(tmp_path / "bad")


def fuzzer() -> ModuleType:
    file = Path(__file__).parents[2] / "bench" / "fuzz_packed.py"
    spec = importlib.util.spec_from_file_location("fuzz_packed", file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_a_few_hundred_mutated_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "level", kernels.level)  # the fuzzer goes through all paths; put the right one back
    counts = fuzzer().run_batch(fuzzer().make(tmp_path), range(300))
    assert sum(counts.values()) == 300 and counts["refused"] > 200 and counts["worked"] > 10


def test_damage_is_repeatable() -> None:
    damage = fuzzer().damage
    assert damage(b"0123456789", random.Random(3)) == damage(b"0123456789", random.Random(3))
