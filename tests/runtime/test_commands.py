"""wanda pack, unpack, run and bench from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import tiny_llama
from wanda.cli import main
from wanda.commands.bench import show


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
    assert run("run", tmp_path / "packed", "", "--tokens", "0", "--temperature", "-1") == 2
    errors = capsys.readouterr().err
    assert "--tokens 0" in errors and "--temperature -1" in errors
    assert run("run", sparse, "the quick") == 2
    assert "no packed checkpoint" in capsys.readouterr().err


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
