"""Models are found where they are, and what cannot be pruned is refused with its cure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from models import tiny_llama
from wanda.checkpoint.source import load_config, load_model, load_tokenizer, resolve, stored_dtype, weight_files
from wanda.device import compute_dtype, pick_device
from wanda.errors import ConfigurationError


def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def test_folder_loads_whole_with_its_tokenizer(tiny: Path) -> None:
    assert resolve(tiny) == tiny == resolve(str(tiny))
    model = load_model(tiny, dtype="float32", device="cpu")
    assert not model.training and model.dtype == torch.float32
    assert stored_dtype(load_config(tiny)) == torch.float32
    assert load_tokenizer(tiny)("the dog", add_special_tokens=False)["input_ids"]


def test_sharded_weights_are_those_of_the_index(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", max_shard_size="40KB")
    (folder / "stray.safetensors").write_bytes(b"not named by the index")
    names = sorted({*json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()})
    assert len(names) > 1 and [file.name for file in weight_files(folder)] == names
    assert resolve(folder) == folder
    (folder / names[0]).unlink()
    with pytest.raises(ConfigurationError, match=f"lacks 1 of its {len(names)} weight files.*{names[0]}.*copy"):
        resolve(folder)


def test_missing_model_names_its_neighbours(tiny: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no such model.*nothing at .*did you mean .*/model\?"):
        resolve(tiny.with_name("modle"))
    with pytest.raises(ConfigurationError, match="no such model"):
        resolve("no slashes but spaces")
    with pytest.raises(ConfigurationError, match=r"is a file.*\.gguf"):
        resolve(tiny / "config.json")


def test_hub_model_that_is_not_cached_is_explained_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"no such model.*no folder org/name.*hub.*network"):
        resolve("org/name")


def test_warm_hub_cache_works_offline(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    commit = "0" * 40
    shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert resolve("org/name") == repository / "snapshots" / commit


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "org/name is gated.*https://huggingface.co/org/name.*hf auth login"),
        (RepositoryNotFoundError, "neither a folder org/name nor a public hub repository.*spelling"),
        (RevisionNotFoundError, "no revision 'v9'"),
    ],
)
def test_refusals_of_the_hub(monkeypatch: pytest.MonkeyPatch, error: type[HfHubHTTPError], message: str) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise error("refused", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ConfigurationError, match=message):
        resolve("org/name", revision="v9")


def test_folders_that_are_no_whole_checkpoint(tiny: Path, tmp_path: Path) -> None:
    folder = copy(tiny, tmp_path)
    weights = folder / "model.safetensors"

    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is not a whole safetensors file.*again"):
        resolve(folder)
    weights.write_bytes(b"\xff" * 1000)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is not a whole safetensors file.*again"):
        resolve(folder)

    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match=r"pickle files only.*only safetensors is read"):
        resolve(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigurationError, match="no weights"):
        resolve(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"config\.json cannot be read"):
        resolve(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        resolve(folder)


def test_quantised_checkpoint_is_refused_with_its_method(tiny: Path, tmp_path: Path) -> None:
    folder = copy(tiny, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for place in (config, config.setdefault("text_config", {})):
        place["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigurationError, match=r"quantised checkpoint \(gptq\); prune the original"):
            resolve(folder)
        del place["quantization_config"]


def test_architecture_that_is_unknown_or_brings_code(tiny: Path, tmp_path: Path) -> None:
    folder = copy(tiny, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llamma"}))
    with pytest.raises(ConfigurationError, match="model_type 'llamma'"):
        load_config(folder)
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(ConfigurationError, match=r"code of its own.*--trust-remote-code"):
        load_config(folder)


def test_folder_without_tokenizer(tiny: Path, tmp_path: Path) -> None:
    folder = copy(tiny, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ConfigurationError, match=r"no tokenizer that can be loaded.*copy"):
        load_tokenizer(folder)


def write_gguf(file: Path, width: int = 32, vocabulary: int = 16) -> dict[str, np.ndarray]:
    """A one-block Llama in GGUF, its matrices quantised to Q8_0; returns the matrices as they were."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(ord("a") + i) for i in range(vocabulary - 1)), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    random = np.random.default_rng(0)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    matrices = {f"blk.0.{name}.weight": random.standard_normal((width, width), np.float32) for name in names}
    matrices["token_embd.weight"] = random.standard_normal((vocabulary, width), np.float32)
    for name, matrix in matrices.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(matrix, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def test_gguf_becomes_an_ordinary_checkpoint_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    matrices = write_gguf(tmp_path / "model.gguf")
    folder = resolve(tmp_path / "model.gguf")
    assert folder.is_relative_to(tmp_path / "cache" / "wanda")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    model = load_model(folder, dtype="float32")
    weight = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    # Q8_0 rounds to 1/254 of each 32 weights' largest, bfloat16 to 1/256 of each
    np.testing.assert_allclose(weight, matrices["blk.0.ffn_down.weight"], atol=3.5 * (1 / 254 + 1 / 256))
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(tmp_path / "model.gguf") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_broken_gguf_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    write_gguf(file)
    whole = file.read_bytes()
    for data in (b"", b"GGUF", b"nothing of the sort", whole[: len(whole) // 2]):
        file.write_bytes(data)
        with pytest.raises(ConfigurationError, match=r"model\.gguf cannot be read as a GGUF model.*again"):
            resolve(file)
        assert list((tmp_path / "cache" / "wanda" / "gguf").iterdir()) == []


def test_device_and_type_that_are_not_there() -> None:
    with pytest.raises(ConfigurationError, match=r"device 'tpu9'.*choose cpu"):
        pick_device("tpu9")
    with pytest.raises(ConfigurationError, match="did you mean bfloat16"):
        compute_dtype(torch.device("cpu"), "bfloat61")
    assert compute_dtype(torch.device("cpu"), "float16") == torch.float16
    assert compute_dtype(torch.device("cuda"), "auto", torch.float16) == torch.float16
    assert compute_dtype(torch.device("cuda"), "auto", None) == torch.bfloat16
    assert compute_dtype(torch.device("cpu"), "auto") in (torch.bfloat16, torch.float32)


def test_packed_folder_is_refused_unless_asked_for(tiny: Path, tmp_path: Path) -> None:
    folder = copy(tiny, tmp_path)
    (folder / "wanda_packed.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="is packed; make an ordinary checkpoint of it first: wanda unpack"):
        resolve(folder)
    assert resolve(folder, packed=True) == folder
