"""`wanda compare` end to end, every cell pruned by a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import wanda
from models import tiny_tokenizer
from wanda.cli import main
from wanda.evaluation.perplexity import perplexity


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 40)
    return str(file)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `wanda compare ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_prunes_in_processes_and_goes_on(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shared = ["--samples", "2", "--seqlen", "24", "--windows", "4", "--dtype", "float32", "--out", str(out)]
    arguments = [str(tiny), "--methods", "wanda", "--pattern", "2:4", "--text", text, "--calibration", text]
    code, printed, log = run(capsys, *arguments, *shared, "--json")
    found = json.loads(printed.splitlines()[-1])
    assert code == 0 and "2/2 wanda 2:4: pruning" in log and not (out / "models").exists()
    assert [row["name"] for row in found["cells"]] == ["dense", "wanda 2:4"]
    own: Any = wanda.prune(
        tiny, out=tmp_path / "own", method="wanda", pattern="2:4", calibration=text, samples=2, seqlen=24,
        dtype="float32", progress=False,
    )  # fmt: skip
    expected = perplexity(tmp_path / "own", text, seqlen=24, windows=4, dtype="float32").perplexity
    assert found["cells"][1]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["cells"][1]["sparsity"] == own.sparsity == 0.5
    assert all(row["peak_memory_bytes"] > 1e8 and row["seconds"] > 0 for row in found["cells"][1:])

    monkeypatch.setattr("subprocess.Popen", None)  # nothing is pruned again
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, log = run(capsys, *arguments, *shared)
    assert code == 0 and f"{expected:.2f}" in printed and log.count("of an earlier run") == 2
    assert max(map(len, printed.splitlines())) <= 80


def test_message_of_a_pruning_process_that_fails(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, text: str
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny)
    torch.nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, float("nan"))
    model.save_pretrained(tmp_path / "bad")
    tiny_tokenizer().save_pretrained(tmp_path / "bad")
    out = tmp_path / "out"
    shared = ["--text", text, "--calibration", text, "--seqlen", "24", "--windows", "2", "--out", str(out)]
    code, printed, log = run(capsys, str(tmp_path / "bad"), "--methods", "wanda", *shared)
    assert code == 1 and printed == "" and "2 of 2 cells failed" in log
    assert "wanda 50%: pruning ended with exit code 1: model.layers.1.mlp.up_proj" in log
    assert not (out / "models").exists()


def test_faults_are_one_message_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, printed, log = run(
        capsys, str(tiny), "--methods", "owl", "best", "--pattern", "2:4,8:4", "--text", "wikitex", "--out", str(out)
    )
    assert code == 2 and printed == "" and not out.exists()
    for part in ("owl 2:4: the allocation owl cannot vary", "8:4", "did you mean wikitext2"):
        assert part in log
