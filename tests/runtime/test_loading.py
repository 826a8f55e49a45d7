"""A packed checkpoint as an ordinary transformers model: the same outputs, the same interfaces, less memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    pipeline,
)

import wanda
from models import tiny_config, tiny_llama, tiny_tokenizer
from wanda.checkpoint.packed import MANIFEST, manifest_checksum, pack
from wanda.checkpoint.tensors import read_header
from wanda.errors import ConfigurationError, RunError
from wanda.evaluation import models as evaluated
from wanda.patterns import NM
from wanda.runtime import choice, loading, semi_structured
from wanda.runtime.layers import FastLinear, PackedLinear, PackedTable
from wanda.runtime.loading import weights_of
from wanda.runtime.measure import decode_seconds, fresh, prefill_seconds, read_bandwidth
from wanda.runtime.semi_structured import sparse_layers

kernels_missing = pytest.mark.skipif(loading.native() is None, reason="the C kernels are not compiled here")


@pytest.fixture(autouse=True)
def bfloat16_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that models compute in the type they are stored in, on every machine."""
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: True)


def prune_blocks(model: PreTrainedModel, sparsity: float = 0.6) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and ("layers" in name or ".h." in name):
                gone = weight.float().abs().argsort(dim=-1)[..., : int(weight.shape[-1] * sparsity)]
                weight.scatter_(-1, gone, 0.0)


def packed_pair(folder: Path, model: PreTrainedModel) -> tuple[Path, Path]:
    prune_blocks(model)
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    pack(str(folder / "dense"), folder / "packed")
    return folder / "dense", folder / "packed"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    source = tiny_llama(
        folder / "source", torch.bfloat16, hidden_size=64, intermediate_size=160, tie_word_embeddings=True
    )
    return packed_pair(folder, AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16))


def dense_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def in_memory(folder: Path) -> Any:
    """Everything packed, on whatever kernels there are."""
    return wanda.load(folder, prefer="memory")


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to a few roundings to bfloat16 on the way."""
    return bool(((a.float() - b.float()).abs() <= 0.03 * b.float().abs().max()).all())


@kernels_missing
def test_logits_and_generated_text(pair: tuple[Path, Path]) -> None:
    dense, packed = dense_model(pair[0]), in_memory(pair[1])
    assert type(packed) is type(dense) and packed.dtype == torch.bfloat16 and not packed.training
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 4 * 7
    assert packed.generation_config.to_dict() == dense.generation_config.to_dict()
    assert packed.lm_head.weight is packed.get_input_embeddings().weight
    for tokens in (1, 9, 60):
        ids = torch.randint(300, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            assert close(packed(ids).logits, dense(ids).logits)
    ids = torch.tensor([[5, 6, 7]])
    assert packed.generate(ids, max_new_tokens=5, do_sample=False).shape[1] <= 8
    text = pipeline("text-generation", model=packed, tokenizer=tiny_tokenizer())("the quick", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("the quick")


@kernels_missing
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_cpu_without_bfloat16_computes_in_float32(
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
) -> None:
    """With packed values of bfloat16: the logits are those of the dense model in float32, not of one in bfloat16."""
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)
    packed = wanda.load(pair[1], prefer="memory", dtype=dtype)
    assert ("computes in float32" in capsys.readouterr().err) == (dtype == "auto")
    assert packed.dtype == torch.float32
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 4 * 7
    assert all(layer.matrix.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32 for layer in layers)
    dense = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32).eval()
    for tokens in (1, 9, 60):
        ids = torch.randint(300, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    packed.save_pretrained(tmp_path / "again")
    before, after = dense.state_dict(), dense_model(tmp_path / "again").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@kernels_missing
@pytest.mark.parametrize("kind", ["tied", "untied", "scaled"])
def test_large_dense_matrices_keep_their_two_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Embeddings and head of a model that computes in float32: half the memory, the same results and checkpoint."""
    files = packed_pair(tmp_path, with_many_tokens(tmp_path, kind))
    packed = wanda.load(files[1], prefer="memory", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(files[0], dtype=torch.float32).eval()
    head, table = packed.get_output_embeddings(), packed.get_input_embeddings().weight
    assert isinstance(head, PackedLinear) and isinstance(table, PackedTable)
    assert (head.matrix is table.matrix) == (kind != "untied") and head.matrix.dtype == torch.bfloat16
    assert "dense" not in capsys.readouterr().err
    held, whole = (sum(tensor.nbytes for tensor in weights_of([model])) for model in (packed, dense))
    assert held < 0.55 * whole
    ids = torch.randint(20000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    told = [model.generate(ids[:, :5], max_new_tokens=6, do_sample=False) for model in (packed, dense)]
    assert torch.equal(*told)
    whole_table = dense.get_input_embeddings().weight
    assert table.shape == whole_table.shape and torch.equal(table.float(), whole_table)  # what tensors have
    product = torch.nn.functional.linear(whole_table[:2], table)  # and as any function's argument
    torch.testing.assert_close(product, whole_table[:2] @ whole_table.T)
    assert torch.equal(torch.cat([table, whole_table]), torch.cat([whole_table, whole_table]))
    assert torch.equal(torch.nn.functional.embedding(ids, weight=table), whole_table[ids])
    packed.save_pretrained(tmp_path / "again")
    before, after = dense.state_dict(), dense_model(tmp_path / "again").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert ("lm_head.weight" in read_header(tmp_path / "again" / "model.safetensors")[0]) == (kind == "untied")
    monkeypatch.setattr(choice, "level", lambda: 0)  # the portable kernels gain nothing
    ordinary = wanda.load(files[1], dtype="float32")
    assert type(ordinary.get_output_embeddings()) is nn.Linear
    assert isinstance(ordinary.get_input_embeddings().weight, nn.Parameter)


def with_many_tokens(folder: Path, kind: str) -> PreTrainedModel:
    """A tiny bfloat16 model whose embeddings are large; Gemma's class of its own scales them."""
    if kind == "scaled":
        config = Gemma3TextConfig(
            hidden_size=64, intermediate_size=160, vocab_size=20000, head_dim=16, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        )  # fmt: skip
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    options = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 20000}
    source = tiny_llama(folder / "source", torch.bfloat16, **options, tie_word_embeddings=kind == "tied")
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)


@kernels_missing
@pytest.mark.parametrize("why", ["two names", "a layer of another kind"])
def test_tied_matrices_that_cannot_be_kept_stay_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    files = packed_pair(tmp_path, with_many_tokens(tmp_path, "tied"))
    if why == "two names":  # of the same weights in the file
        tensors = load_file(files[0] / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, files[0] / "model.safetensors", {"format": "pt"})
        pack(str(files[0]), tmp_path / "both")
        files = files[0], tmp_path / "both"
    else:
        known = loading._layer
        monkeypatch.setattr(loading, "_layer", lambda *a: None if a[2].out == 20000 else known(*a))
    packed = wanda.load(files[1], prefer="memory", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(files[0], dtype=torch.float32).eval()
    assert packed.get_output_embeddings().weight is packed.get_input_embeddings().weight
    ids = torch.randint(20000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@kernels_missing
def test_layers_that_gain_nothing_are_ordinary_and_that_is_said_once(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "without_gain", lambda matrices, dtype: {key for key in matrices if "mlp" in key})
    packed, dense = wanda.load(pair[1]), dense_model(pair[0])
    said = capsys.readouterr().err
    assert said.count("12 of 28 packed matrices are loaded dense") == 1 and "prefer memory" in said
    kinds = {name: type(module) for name, module in packed.named_modules() if "_proj" in name}
    assert all((kind is PackedLinear) == ("mlp" not in name) for name, kind in kinds.items()) and len(kinds) == 28
    weights = dict(dense.named_parameters())
    for name in kinds:
        assert torch.equal(packed.get_submodule(name).weight, weights[f"{name}.weight"])
        assert (f"{name}.weight" in dict(packed.named_parameters())) == ("mlp" in name)
    everything = in_memory(pair[1])
    assert "loaded dense" not in capsys.readouterr().err
    assert sum(isinstance(module, PackedLinear) for module in everything.modules()) == 28


@kernels_missing
def test_packed_layers_hold_no_dense_weight(pair: tuple[Path, Path]) -> None:
    packed = in_memory(pair[1])
    entries, _ = read_header(pair[1] / "packed-00001.safetensors")
    assert sum(tensor.nbytes for tensor in weights_of([packed])) == pytest.approx(
        sum(entry.nbytes for entry in entries.values()),
        abs=200,  # rotary frequencies are in no file
    )
    assert not any(isinstance(module, PackedLinear) and list(module.parameters()) for module in packed.modules())


@kernels_missing
def test_saving_writes_an_ordinary_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    in_memory(pair[1]).save_pretrained(tmp_path / "again")
    before, after = dense_model(pair[0]).state_dict(), dense_model(tmp_path / "again").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@kernels_missing
def test_gradients_flow_through_packed_layers(pair: tuple[Path, Path]) -> None:
    dense, packed = dense_model(pair[0]), in_memory(pair[1])
    ids = torch.randint(300, (1, 20))
    gradients = []
    for model in (dense, packed):
        model(ids, labels=ids).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert close(gradients[1], gradients[0])


def test_without_kernels_it_runs_dense(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "native", lambda: None)
    with pytest.raises(ConfigurationError, match="needs the C kernels"):
        in_memory(pair[1])
    packed, dense = wanda.load(pair[1]), dense_model(pair[0])
    assert not any(isinstance(module, PackedLinear | FastLinear) for module in packed.modules())
    ids = torch.randint(300, (1, 9))
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, dense(ids).logits)


@kernels_missing
def test_transposed_storage(tmp_path: Path) -> None:
    """GPT-2 stores [in, out] and its files lack the prefix that its modules have."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    dense, packed = packed_pair(tmp_path, GPT2LMHeadModel(config))
    model = in_memory(packed)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * 4
    ids = torch.randint(300, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense_model(dense)(ids).logits, rtol=1e-4, atol=1e-5)


@kernels_missing
def test_experts_that_are_fused_in_memory_run_dense_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    dense, packed = packed_pair(tmp_path, MixtralForCausalLM(config))
    capsys.readouterr()
    model = in_memory(packed)
    assert "18 packed matrices are fused in memory" in capsys.readouterr().err
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * 4
    ids = torch.randint(300, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense_model(dense)(ids).logits, rtol=1e-4, atol=1e-5)


def test_tensors_that_do_not_fit_the_config(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for number, (name, value) in enumerate((("intermediate_size", 176), ("num_hidden_layers", 5), ("model_type", "?"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in pair[1].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises((RunError, ConfigurationError), match=str(folder)):
            wanda.load(folder)


def test_a_matrix_of_another_width_is_refused_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in pair[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((folder / MANIFEST).read_text())
    key = "model.layers.1.mlp.down_proj.weight"
    manifest["matrices"][key]["shape"][1] += 1  # as many mask words as before: only the config knows better
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.down_proj"):
        wanda.load(folder)


def test_what_load_refuses(tiny: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="no packed checkpoint"):
        wanda.load(tiny)
    with pytest.raises(ConfigurationError, match=r"(?s)did you mean semi_structured.*did you mean memory"):
        wanda.load(tiny, backend="semi-structured", prefer="memroy")
    with pytest.raises(
        ConfigurationError, match=r'(?s)prefer="memory" would change nothing.*float32.* would change no'
    ):
        wanda.load(tiny, backend="semi_structured", prefer="memory", dtype="float32")
    with pytest.raises(ConfigurationError, match=r"unknown dtype.*did you mean float32"):
        wanda.load(pair[1], dtype="flot32")
    with pytest.raises(ConfigurationError, match="holds bfloat16 values, which cannot be computed in float16"):
        wanda.load(pair[1], dtype="float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="NVIDIA"):
        wanda.load(tiny, backend="semi_structured")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bfloat16_cpu", [False, True])
def test_tensor_cores_get_the_type_that_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, packed: bool, bfloat16_cpu: bool
) -> None:
    """Whatever this CPU computes in, and whatever config.json says; what follows needs a GPU."""
    model = LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=64, num_hidden_layers=1)).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.view(-1, 4)[:, :2] = 0
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    if packed:
        pack(str(tmp_path / "model"), tmp_path / "packed")
    monkeypatch.setattr("wanda.device.cpu_has_bfloat16", lambda: bfloat16_cpu)
    monkeypatch.setattr(semi_structured, "require_cuda", lambda: None)
    monkeypatch.setattr(semi_structured, "convert", lambda model: (sparse_layers(model), model)[1])
    loaded = wanda.load(tmp_path / ("packed" if packed else "model"), backend="semi_structured")
    before = dict(model.named_parameters())
    assert all(torch.equal(value, before[name]) and value.dtype == dtype for name, value in loaded.named_parameters())


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *inputs, **options):
        result = super().forward(*inputs, **options)
        result.logits = result.logits + 1
        return result
"""


@kernels_missing
def test_code_of_the_models_own_runs_when_it_is_trusted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for file in pair[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE)
    pack(str(folder), tmp_path / "packed")
    for load in (wanda.load, evaluated.load):
        with pytest.raises(ConfigurationError, match="--trust-remote-code"):
            load(tmp_path / "packed")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain = in_memory(pair[1])(ids).logits
        for model in (
            wanda.load(tmp_path / "packed", prefer="memory", trust_remote_code=True),
            evaluated.load(tmp_path / "packed", trust_remote_code=True),
        ):
            assert type(model).__name__ == "OwnModel" and close(model(ids).logits, plain + 1)
    # a config that transformers knows, with a class that it does not
    config |= {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"own\.OwnModel.*trust_remote_code"):
        wanda.load(tmp_path / "packed")
    (tmp_path / "packed" / "own.py").write_text("import nothing_of_that_name")
    with pytest.raises(ConfigurationError, match=r"own\.OwnModel that config.json names cannot be loaded"):
        wanda.load(tmp_path / "packed", trust_remote_code=True)


def test_the_pattern_of_sparse_tensor_cores() -> None:
    weight = torch.randn(64, 64).half()
    good = weight.reshape(-1, 4).clone()
    good[:, :2] = 0
    good = good.reshape(64, 64)
    assert NM(2, 4).obeyed(good) and not NM(2, 4).obeyed(weight) and not NM(2, 4).obeyed(good[:, :62])

    def model(*weights: Tensor) -> nn.Module:
        layers = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
        for layer, w in zip(layers, weights, strict=True):
            layer.weight = nn.Parameter(w)
        return nn.Sequential(*layers)

    assert sparse_layers(model(good, weight, good)) == ["0", "2"]
    unstructured = torch.where(torch.rand(64, 64) < 0.5, weight, 0)
    with pytest.raises(ConfigurationError, match=r"not 2:4 \(1"):
        sparse_layers(model(good, unstructured))
    with pytest.raises(ConfigurationError, match="no 2:4 layers"):
        sparse_layers(model(weight))
    for wrong in (good.float(), good[:24]):
        with pytest.raises(ConfigurationError, match="32 x 64"):
            sparse_layers(model(wrong))


@kernels_missing
def test_measuring(pair: tuple[Path, Path]) -> None:
    model = in_memory(pair[1])
    assert decode_seconds(model, 3, 2) > 0 and prefill_seconds(model, 20) > 0 and read_bandwidth(1 << 20, 2) > 0
    alone = fresh(pair[1], packed=True)
    assert 0 < alone.opened <= alone.ready and alone.resident > 0
