"""wanda pack, unpack, run and bench from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from models import VOCABULARY, tiny_llama, tiny_tokenizer
from wanda.cli import main
from wanda.commands.bench import show
from wanda.runtime.measure import folder_bytes


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny_llama(tmp_path_factory.mktemp("sparse") / "model", torch.bfloat16)
    weights = load_file(source / "model.safetensors")
    for key, weight in weights.items():
        if "proj" in key:
            weights[key] = torch.where(weight.abs() > weight.abs().median(), weight, 0)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return source


def run(*arguments: str | Path) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_pack_and_unpack(sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pack", sparse, "--out", tmp_path / "packed", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["packed"] == 28 and summary["packed_bytes"] < summary["dense_bytes"]
    assert run("pack", sparse, "--out", tmp_path / "packed") == 2
    assert "not empty" in capsys.readouterr().err
    assert run("pack", sparse, "--out", tmp_path / "packed", "--overwrite", "--compress") == 0
    assert "28 matrices packed" in capsys.readouterr().out
    assert run("unpack", tmp_path / "packed", "--out", tmp_path / "again") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (sparse, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_dense_model_stays_dense(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pack", tiny, "--out", tmp_path / "packed") == 0
    assert "no matrix is sparse enough" in capsys.readouterr().out


def test_run_streams_text_and_reports_speed(sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pack", sparse, "--out", tmp_path / "packed") == 0
    capsys.readouterr()
    assert run("run", tmp_path / "packed", "the quick brown", "--tokens", "6") == 0
    streamed = capsys.readouterr()
    assert streamed.out.strip() and "prompt tokens, first token after" in streamed.err
    sampled = ["--tokens", "3", "--temperature", "0.8", "--seed", "3", "--prefer", "memory"]
    assert run("run", tmp_path / "packed", "the quick", *sampled) == 0
    capsys.readouterr()
    assert run("run", tmp_path / "packed", "") == 2
    assert "the prompt has no tokens" in capsys.readouterr().err
    assert run("run", sparse, "the quick") == 2
    assert "no packed checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["-1", "nan", "inf"])
@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_run_refuses_all_bad_numbers_at_once(
    temperature: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["--tokens", "0", "--temperature", temperature, "--seed", str(seed)]
    assert run("run", tmp_path, "the quick", *bad) == 2
    said = capsys.readouterr().err
    assert "--tokens 0" in said and f"--temperature {float(temperature)}" in said and f"--seed {seed} has to be" in said


def test_run_refuses_a_seed_that_would_be_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", tmp_path, "the quick", "--seed", "3") == 2
    assert "--seed 3 would change nothing without sampling" in capsys.readouterr().err


def test_run_keeps_to_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model with 64 learned positions: the default ends there, what was asked for is refused before loading."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            parameter.data[::2] = 0
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    assert run("pack", tmp_path / "model", "--out", tmp_path / "packed") == 0
    prompt = "the quick brown fox"
    length = len(tokenizer(prompt)["input_ids"])
    capsys.readouterr()
    assert run("run", tmp_path / "packed", prompt) == 0
    said = capsys.readouterr().err
    assert f"at most {64 - length} tokens" in said and f"; {64 - length} tokens at" in said
    assert run("run", tmp_path / "packed", prompt, "--tokens", str(64 - length)) == 0
    said = capsys.readouterr().err
    assert "at most" not in said and f"; {64 - length} tokens at" in said
    monkeypatch.setattr("wanda.runtime.loading.load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert run("run", tmp_path / "packed", prompt, "--tokens", str(65 - length)) == 2
    assert f"context of 64 tokens; ask for {64 - length} at most" in capsys.readouterr().err
    assert run("run", tmp_path / "packed", "fox " * 100) == 2
    assert "leaves no room in the model's context of 64" in capsys.readouterr().err


def test_bench(sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pack", sparse, "--out", tmp_path / "packed") == 0
    capsys.readouterr()
    small = ["--tokens", "2", "--prompt", "3", "--prefill", "20", "--rounds", "2"]
    assert run("bench", tmp_path / "packed", "--against", sparse, *small, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    for what in ("decode", "prefill"):
        spread = result[what]["ratio"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert result["file_bytes"]["packed"] < result["file_bytes"]["dense"]
    show(result)
    assert "faster" in capsys.readouterr().out
    assert run("bench", tmp_path / "packed", "--against", sparse, "--rounds", "0") == 2
    capsys.readouterr()
    too_long = ["--prompt", "100", "--tokens", "29", "--prefill", "129"]  # of 128
    assert run("bench", tmp_path / "packed", "--against", sparse, *too_long) == 2
    said = capsys.readouterr().err
    assert said.count("need 129 tokens, and the context of") == 4 and "--prefill 129" in said


def test_file_sizes_are_of_what_is_loaded(sparse: Path, tmp_path: Path) -> None:
    """A copy of the weights in another layout counts nowhere, whether an index names the files or there is one file."""
    whole = Path(shutil.copytree(sparse, tmp_path / "whole"))
    size = (whole / "model.safetensors").stat().st_size
    shutil.copy(whole / "model.safetensors", whole / "consolidated.safetensors")
    assert folder_bytes(whole) == size
    sharded = tiny_llama(tmp_path / "sharded", max_shard_size="50KB")
    shards = list(sharded.glob("model-*.safetensors"))
    shutil.copy(whole / "model.safetensors", sharded / "consolidated.safetensors")
    assert len(shards) > 1 and folder_bytes(sharded) == sum(file.stat().st_size for file in shards)
    assert run("pack", sparse, "--out", tmp_path / "packed") == 0
    files = list((tmp_path / "packed").glob("*.safetensors"))
    assert files and folder_bytes(tmp_path / "packed") == sum(file.stat().st_size for file in files)
