"""`wanda eval` end to end on tiny models: tables, JSON, what is kept with a pruned folder, and bad requests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import tiny_llama
from wanda.cli import main
from wanda.evaluation.perplexity import perplexity


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `wanda eval ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        main(["eval", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 40)
    return str(file)


@pytest.fixture
def pruned(tiny: Path, tmp_path: Path) -> Path:
    """A folder with a report and a model card, as pruning leaves it."""
    folder = Path(shutil.copytree(tiny, tmp_path / "pruned"))
    (folder / "wanda.json").write_text(json.dumps({"format": 1, "recipe": {"method": "wanda"}}))
    (folder / "README.md").write_text("# pruned\n\nthe end\n")
    return folder


def test_json_of_several_models_and_the_dense_one(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, text: str
) -> None:
    other = tiny_llama(tmp_path / "other", seed=1, max_position_embeddings=64)
    options = ["--text", text, "--dtype", "float32", "--against", str(tiny)]
    code, out, err = run(capsys, str(tiny), str(other), *options, "--json")
    results = json.loads(out.splitlines()[-1])["results"]
    assert code == 0 and [result["model"] for result in results] == [str(tiny), str(other)]
    for folder, result in zip((tiny, other), results, strict=True):
        expected = perplexity(folder, text, seqlen=64, against=tiny, dtype="float32")  # the smaller context of the two
        assert result["perplexity"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        assert result["perplexity"]["kl"] == pytest.approx(expected.kl, abs=1e-6)
        assert result["perplexity"]["tokens"] == expected.windows * 63
    assert str(other) in err and not (tiny / "wanda.json").exists()


def test_table_fits_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, text: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, str(tiny), "--text", text, "--dtype", "float32", "--windows", "2", "--seqlen", "32")
    expected = perplexity(tiny, text, seqlen=32, windows=2, dtype="float32")
    assert code == 0 and f"{expected.perplexity:.4g}" in out and "2 windows of 32 tokens" in out.replace("\n", " ")
    assert max(map(len, out.splitlines())) <= 80


def test_results_are_merged_into_the_report_and_the_card(
    capsys: pytest.CaptureFixture[str], pruned: Path, text: str
) -> None:
    before = {file.name: file.read_bytes() for file in pruned.iterdir()}
    for windows in ("2", "2", "3"):
        assert run(capsys, str(pruned), "--text", text, "--windows", windows, "--seqlen", "32")[0] == 0
    report = json.loads((pruned / "wanda.json").read_text())
    kept = report["evaluation"]["perplexity"]
    assert report["recipe"] == {"method": "wanda"} and [value["windows"] for value in kept.values()] == [2, 3]
    card = (pruned / "README.md").read_text()
    assert card.startswith("# pruned\n\nthe end\n") and card.count("## Evaluation") == 1
    assert card.count("| perplexity | ") == 2
    changed = {file.name for file in pruned.iterdir() if before.get(file.name) != file.read_bytes()}
    assert changed == {"wanda.json", "README.md"}


@pytest.mark.parametrize("fault", ["broken", "unwritable"])
def test_a_report_that_cannot_be_updated_costs_no_result(
    capsys: pytest.CaptureFixture[str], pruned: Path, tiny: Path, text: str, fault: str
) -> None:
    """All is measured and shown, then the fault is said; whichever model has it."""
    if fault == "broken":
        (pruned / "wanda.json").write_text("[")
    else:  # also for root, who may write to read-only folders
        (pruned / "wanda.json.tmp").mkdir()
    before = (pruned / "wanda.json").read_bytes()
    options = ["--text", text, "--windows", "1", "--seqlen", "32", "--dtype", "float32"]
    expected = perplexity(tiny, text, seqlen=32, windows=1, dtype="float32").perplexity
    code, out, err = run(capsys, str(pruned), str(tiny), *options)
    assert code == 1 and err.count("cannot be kept in") == 1 and str(pruned / "wanda.json") in err
    assert out.count(f"{expected:.4g}") == 2
    code, out, err = run(capsys, str(pruned), str(tiny), *options, "--json")
    found = [result["perplexity"]["perplexity"] for result in json.loads(out.splitlines()[-1])["results"]]
    assert code == 1 and found == pytest.approx([expected, expected], rel=1e-6)
    assert (pruned / "wanda.json").read_bytes() == before


def broken_llama(folder: Path) -> Path:
    """A tiny Llama whose head overflows, so that its losses are not finite."""
    tiny_llama(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], torch.inf)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_fault_of_one_model_costs_no_other_its_result(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, text: str
) -> None:
    broken, other = broken_llama(tmp_path / "broken"), tiny_llama(tmp_path / "other", seed=1)
    models = [str(tiny), str(broken), str(other)]
    options = ["--text", text, "--windows", "2", "--seqlen", "32", "--dtype", "float32"]
    expected = [perplexity(folder, text, seqlen=32, windows=2, dtype="float32").perplexity for folder in (tiny, other)]
    code, out, err = run(capsys, *models, *options)
    assert code == 1 and all(f"{value:.4g}" in out for value in expected)
    said = err.splitlines()
    assert said[-1].startswith(f"wanda: {broken}: the model's losses are not finite")
    for folder, value in zip((tiny, other), expected, strict=True):  # each is told as soon as it is known
        assert f"{folder}: perplexity {value:.4g}" in said
    code, out, _ = run(capsys, *models, *options, "--json")
    results = json.loads(out.splitlines()[-1])["results"]
    assert code == 1 and [result["model"] for result in results] == models
    found = [results[place]["perplexity"]["perplexity"] for place in (0, 2)]
    assert found == pytest.approx(expected, rel=1e-6) and results[0]["error"] is None
    assert results[1]["perplexity"] is None and "not finite" in results[1]["error"]
    code, out, err = run(capsys, str(broken), *options)
    assert code == 1 and out == "" and err.count("not finite") == 1


def test_ctrl_c_shows_what_was_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path, text: str
) -> None:
    from wanda.evaluation import perplexity as measuring

    other = tiny_llama(tmp_path / "other", seed=1)
    original = measuring.measure
    calls: list[object] = []

    def measure(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    options = ["--text", text, "--windows", "2", "--seqlen", "32", "--dtype", "float32"]
    expected = perplexity(tiny, text, seqlen=32, windows=2, dtype="float32").perplexity
    monkeypatch.setattr(measuring, "measure", measure)
    code, out, err = run(capsys, str(tiny), str(other), *options)
    assert code == 130 and f"{expected:.4g}" in out and "wanda: stopped" in err
    code, out, _ = run(capsys, str(tiny), str(other), *options, "--json")
    results = json.loads(out.splitlines()[-1])["results"]
    assert code == 130 and results[0]["perplexity"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert results[1]["perplexity"] is None and "stopped" in results[1]["error"]


def test_all_faults_of_a_request_in_one_message(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    code, out, err = run(capsys, str(tiny), "--text", "wikitex", "--windows", "0", "--limit", "3", "--device", "tpu9")
    assert code == 2 and out == ""
    for part in ("did you mean wikitext2", "--windows 0", "--limit would change nothing", "tpu9"):
        assert part in err
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, str(tmp_path / "empty"), str(tmp_path / "none"), str(tiny), "--seqlen", "4096")
    assert code == 2
    for part in ("no config.json", "no such model", "context of 128"):
        assert part in err
    code, _, err = run(capsys)
    assert code == 2 and "no model is named" in err


def test_packed_models_are_measured_packed(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, text: str
) -> None:
    from byhand import prune_by_hand
    from wanda.checkpoint.packed import pack

    folder = prune_by_hand(tiny, tmp_path / "pruned")
    pack(folder, tmp_path / "packed")
    code, out, _ = run(capsys, str(tmp_path / "packed"), "--text", text, "--seqlen", "32", "--windows", "3", "--json")
    found = json.loads(out.splitlines()[-1])["results"][0]["perplexity"]["perplexity"]
    expected = perplexity(folder, text, seqlen=32, windows=3, dtype="float32").perplexity
    assert code == 0 and found == pytest.approx(expected, rel=0.01)
    code, _, err = run(capsys, str(tmp_path / "packed"), "--dtype", "float16", "--device", "meta")
    assert code == 2 and "packed: it runs on the CPU" in err and "cannot be computed in float16" in err


def test_streamed_perplexity_is_the_model_in_memorys(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, text: str
) -> None:
    other = tiny_llama(tmp_path / "other", seed=1)
    options = ["--text", text, "--dtype", "float32", "--against", str(tiny), "--batch", "1", "--seqlen", "32", "--json"]
    found = []
    for stream in ([], ["--stream"]):
        code, out, _ = run(capsys, str(other), *options, *stream)
        assert code == 0
        values = json.loads(out.splitlines()[-1])["results"][0]["perplexity"]
        found.append((values["perplexity"], values["kl"], values["tokens"]))
    assert found[0] == found[1]
    code, _, err = run(capsys, str(other), "--stream", "--tasks", "boolq")
    assert code == 2 and "--stream measures perplexity only" in err


@pytest.mark.parametrize("against", [False, True])
def test_streamed_seconds_count_the_blocks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny: Path, text: str, against: bool
) -> None:
    """By a clock on which nothing takes time but reading a block: 100 s each, four blocks."""
    import time

    from wanda.checkpoint.skeleton import Skeleton

    now, original = [0.0], Skeleton.load_block

    def load_block(self: Skeleton, index: int) -> Any:
        now[0] += 100
        return original(self, index)

    monkeypatch.setattr(Skeleton, "load_block", load_block)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    options = ["--text", text, "--stream", "--windows", "2", "--seqlen", "32", "--dtype", "float32", "--json"]
    code, out, _ = run(capsys, str(tiny), *options, *(["--against", str(tiny)] if against else []))
    assert code == 0
    assert json.loads(out.splitlines()[-1])["results"][0]["perplexity"]["seconds"] == (800 if against else 400)
