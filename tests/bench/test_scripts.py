"""The scripts of bench/: options that would be ignored or end in a traceback, what they keep, kills near the end."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script as `python bench/NAME.py` does, and forgets it, since its name may be another module's."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module
    for name in {file.stem for file in BENCH.glob("*.py")} & set(sys.modules) - before:
        del sys.modules[name]


REFUSED = [
    ("decode_speed", "--out X --sparsity 0.55", "no sparsity 0.55.*0.5, 0.6, 0.7"),
    ("decode_speed", "--out X --only demo --sparsity 0.6", 'no sparsity 0.6; it has {"demo": .0.5, 0.7.}'),
    ("solvers", "--only swap", "no row.*'swap'; there are with --all: swap, rows"),
    ("solvers", "--only nonsense --all", "no row.*'nonsense'; there are: .*pcg, 10 steps"),
    ("solvers", "--rounds 0", "0 is not a whole number of at least 1"),
    ("kills", "--kills 0", "0 is not"),
    ("fuzz_packed", "--files -5", "-5 is not"),
    ("layer_choice", "--paths nonsense", "no kernel path nonsense; it has portable"),
    ("layer_choice", "--rounds 0", "0 is not"),
    ("masks", "--rounds 0", "0 is not"),
    ("memory", "--only blocks --blocks 4", "--blocks is of the large shape"),
    ("memory", "--samples 0", "0 is not"),
    ("prune_speed", "llama-1b --calibration FILE", "--calibration is of smollm2"),
    ("prune_speed", "smollm2 --blocks 0", "0 is not"),
    ("quality", "--calibration A --text B --windows 0", "0 is not"),
    ("scaling", "--only samples --samples 4", "--samples is of the other axes"),
    ("scaling", "--rounds 0", "0 is not"),
    ("experts", "quality --rounds 3", "--rounds is of the part speed"),
    ("experts", "train --samples 3", "--samples is of the parts quality and speed"),
    ("experts", "--steps 0", "0 is not"),
    ("recovery", "--model M --train T --text T --work W --minutes 0", "--minutes 0.0 leaves no time"),
    ("recovery", "--model M --train T --text T --work W --windows 0", "0 is not"),
    ("tasks", "--model M --data D --calibration C --work W --limit 0", "0 is not"),
]


@pytest.mark.parametrize(("script", "options", "message"), REFUSED)
def test_options_that_cannot_be_honoured_are_refused_at_once(
    script: str,
    options: str,
    message: str,
    load: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = load(script)
    heavy = ("correlated_inputs", "make_llama", "model_folder", "make", "measure", "compare", "train", "prune")
    for name in heavy:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, Mock(side_effect=AssertionError(f"{name} was called first")))
    if script == "layer_choice":
        monkeypatch.setattr(module, "native", lambda: SimpleNamespace(best_level=lambda: 0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *options.split()])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_row_of_solvers_is_priced_as_before(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row, whole compositions too, on a small matrix."""
    options = ["--size", "64", "--tokens", "128", "--rounds", "1", "--all", "--out", str(tmp_path / "solvers.json")]
    monkeypatch.setattr(sys, "argv", ["solvers", *options])
    load("solvers").main()
    products = json.loads((tmp_path / "solvers.json").read_text(encoding="utf-8"))["products"]
    assert {"Gram matrix, 128 bfloat16 tokens", "mask, 2:4", "pcg, 10 steps", "swap, rows"} <= set(products)
    assert len(products) == 21 and all(row["min"] > 0 for row in products.values())
    assert "swap, rows" in capsys.readouterr().out


def test_what_is_kept_is_used_for_the_settings_it_was_made_from_alone(load: Any, tmp_path: Path) -> None:
    kept = load("kept")
    folder = tmp_path / "work" / "model"
    settings = {"seed": 0, "train": {"steps": 5, "batch": 2}, "shape": (1, 2)}
    assert not kept.kept(folder, settings)
    kept.note(folder, settings)
    assert not kept.kept(folder, settings)  # killed before it was made
    folder.mkdir()
    assert kept.kept(folder, settings)
    with pytest.raises(SystemExit, match=r"model was made from other settings \(train.steps: 5, not 6\); remove"):
        kept.kept(folder, settings | {"train": {"steps": 6, "batch": 2}})
    with pytest.raises(SystemExit, match=r"\(seed: 0, not null; seeds: null, not \[0\]\)"):
        kept.kept(folder, {"seeds": [0], "train": settings["train"], "shape": [1, 2]})
    with pytest.raises(SystemExit, match=r"nothing says which settings .*unknown was made from"):
        (folder.parent / "unknown").mkdir()
        kept.kept(folder.parent / "unknown", settings)


def test_digits_of_another_split_are_refused(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    digits = load("digits")
    images = digits.write_images(tmp_path / "images", 1790)
    assert len(list((images / "test").rglob("*.png"))) == 1790 and len(list((images / "train").rglob("*.png"))) == 7
    assert digits.write_images(tmp_path / "images", 1790) == images
    with pytest.raises(SystemExit, match=r"images was made from other settings \(test: 1790, not 1000\)"):
        digits.write_images(tmp_path / "images", 1000)


def test_pruned_models_of_other_settings_are_refused(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bench/tasks.py: same model and config, once pruned; another calibration, refused before anything is measured."""
    tasks = load("tasks")
    made = Mock(side_effect=lambda model, out, **options: out.mkdir(parents=True))
    monkeypatch.setattr(tasks, "prune", made)
    monkeypatch.setattr(tasks, "load_tasks", lambda *args, **options: SimpleNamespace(run=lambda *args: []))
    for name in ("load_model", "load_tokenizer", "mean_of_paper", "write"):
        monkeypatch.setattr(tasks, name, lambda *args: None)

    def run(calibration: str) -> None:
        options = ["--model", "M", "--data", "D", "--calibration", calibration, "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", ["tasks", *options])
        tasks.main()

    run("A")
    assert made.call_count == 3  # magnitude, wanda, sparsegpt
    run("A")
    with pytest.raises(SystemExit, match='calibration: "A", not "B"'):
        run("B")
    assert made.call_count == 3


@pytest.mark.parametrize("left", ["journal.jsonl", "lock", "replaced"])
def test_a_kill_in_the_tidy_up_is_resumed_and_compared(
    left: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 of docs/design.md, Faults: the first kill leaves something in DIR, the second one nothing, the third one
    what a resumed run does not take away."""
    kills = load("kills")
    starts: list[bool] = []

    class Runs:
        def __init__(self, source: Path, options: dict[str, Any]):
            pass

        def start(self, out: Path) -> Any:
            out.mkdir()
            (out / "model.safetensors").write_bytes(b"weights")
            starts.append(len(starts) != 1)
            if starts[-1]:
                (out / left).touch()
            return SimpleNamespace(join=lambda timeout=None: None, kill=lambda: None, exitcode=-9)

        def finish(self, out: Path) -> float:
            out.mkdir(exist_ok=True)
            (out / "model.safetensors").write_bytes(b"weights")
            if len(starts) < 3:
                (out / left).unlink(missing_ok=True)
            return 1.0

    monkeypatch.setattr(kills, "Runs", Runs)
    monkeypatch.setattr(kills, "make_llama", lambda folder, shape: folder)
    monkeypatch.setattr(kills, "write_text", lambda file, tokens: "TEXT")
    config = {"kills": 2, "samples": 1, "seqlen": 8, "dtype": "float32", "seed": 0, "shape": {"num_hidden_layers": 8}}
    found = kills.measure(tmp_path, "layer", config)
    assert [row["renamed_but_left"] for row in found["kills"]] == [[left], [left]]
    assert [row["blocks"] for row in found["kills"]] == [8, 8]
    assert [row["identical"] for row in found["kills"]] == [True, False]
    assert found["killed_in_the_tidy_up"] == 2 and found["moments_drawn_again"] == 1
