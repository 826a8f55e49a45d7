"""The command line as a process: help at once, exit codes, one message, nothing half written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models import LINES, tiny_llama
from wanda.block_loop import BlockLoop
from wanda.cli import COMMANDS, main


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wanda", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(LINES * 30), encoding="utf-8")
    return str(file)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from wanda.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert all(name in result.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, ("wanda: stopped; ", "--resume")),
        (MemoryError(), 1, ("memory ran out in block 1 of 4", "--memory")),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, ("memory ran out in block 1 of 4", "--memory")),
    ],
)
def test_a_run_that_is_stopped_says_how_to_go_on(
    error: BaseException,
    code: int,
    told: tuple[str, ...],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(BlockLoop, "_prune", stop)
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(tiny), "--out", str(tmp_path / "out"), "--method", "magnitude"])
    said = capsys.readouterr().err
    assert ended.value.code == code and all(part in said for part in told) and "Traceback" not in said


def test_prune_inspect_and_repeat(tmp_path: Path, text: str) -> None:
    tiny_llama(tmp_path / "dense")
    flags = ["--calibration", text, "--samples", "4", "--seqlen", "32", "--pattern", "2:4"]
    result = run("prune", "dense", "--out", "out", *flags, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["totals"]["sparsity"] == 0.5 and "block 4/4" in result.stderr
    assert report["command"].startswith("wanda prune dense --out out --calibration")
    inspected = json.loads(run("inspect", "out", "--json", cwd=tmp_path).stdout)
    assert inspected["sparsity"] == 0.5
    assert all("2:4" in layer["patterns"] and layer["sparsity"] == 0.5 for layer in inspected["layers"])
    table = run("inspect", "out", cwd=tmp_path).stdout
    assert "model.layers.3.mlp.down_proj" in table and max(map(len, table.splitlines())) <= 80
    again = run("prune", "dense", "--out", "again", "--recipe", "out/wanda.json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()


def test_dry_run_shows_the_plan(tmp_path: Path, text: str) -> None:
    tiny_llama(tmp_path / "dense")
    result = run("prune", "dense", "--out", "out", "--calibration", text, "--seqlen", "32", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "model.layers.*.mlp.down_proj" in result.stdout and "of memory" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_all_faults_are_one_message_with_exit_code_2(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "dense")
    flags = ["--method", "wandaa", "--sparsity", "2", "--seqlen", "4096", "--calibration", "missing.jsonl"]
    result = run("prune", "dense", "--out", "dense", *flags, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    for part in ("wandaa", "did you mean wanda", "sparsity 2", "4096", "missing.jsonl", "is the input itself"):
        assert part in result.stderr, part
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda m: (m / "model.safetensors").unlink(), "no weights"),
        (lambda m: (m / "config.json").unlink(), "config.json"),
        (lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-9]), "safetensors"),
        (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64), "safetensors"),
        (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "pickle"),
        (
            lambda m: (m / "config.json").write_text(
                (m / "config.json").read_text().replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1)
            ),
            "quantised",
        ),
        (lambda m: (m / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_bad_models_are_refused(tmp_path: Path, text: str, spoil, expected: str) -> None:  # type: ignore[no-untyped-def]
    model = tiny_llama(tmp_path / "dense")
    spoil(model)
    result = run(
        "prune", "dense", "--out", "out", "--calibration", text, "--samples", "2", "--seqlen", "32", cwd=tmp_path
    )
    assert result.returncode == 2 and expected in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_unknown_models_and_flags(tmp_path: Path) -> None:
    assert "no such model" in run("prune", "./nowhere", "--out", "out", cwd=tmp_path).stderr
    result = run("prune", "dense", "--out", "out", "--sparsit", "0.5", cwd=tmp_path)
    assert result.returncode != 0 and "--sparsity" in result.stdout + result.stderr


def test_methods_lists_everything_with_its_paper() -> None:
    result = run("methods")
    for name in ("wanda", "sparsegpt", "admm-iterative", "owl", "2306.11695", "2301.00774"):
        assert name in result.stdout
