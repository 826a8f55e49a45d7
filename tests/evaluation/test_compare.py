"""A comparison against prune and perplexity called one by one; stopping, continuing, presets, faults, tables, plots."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import wanda
from wanda import block_loop, calibration
from wanda.checkpoint import folder as output
from wanda.checkpoint.packed import pack
from wanda.errors import ConfigurationError, RunError
from wanda.evaluation import compare as module
from wanda.evaluation import perplexity as perplexity_module
from wanda.evaluation.grid import PRESETS, Grid, Setting, label
from wanda.evaluation.perplexity import perplexity
from wanda.plan import Choices
from wanda.recipe import Recipe
from wanda.report.comparison import Board

SHARED: dict[str, Any] = {"seqlen": 24, "samples": 4, "windows": 6, "dtype": "float32", "progress": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog and small weights may go " * 40)
    return str(file)


class Pruning:
    """Prunes in this process, which is quicker than one of its own; counts, and does what it is told to instead."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.instead: dict[int, BaseException] = {}

    def __call__(self, model: str, folder: Path, recipe: Recipe, shared: Path, now: Callable[[str], None]) -> None:
        self.folders.append(folder.name)
        if len(self.folders) in self.instead:
            folder.with_name(folder.name + ".partial").mkdir(parents=True)
            raise self.instead[len(self.folders)]
        wanda.prune(model, out=folder, recipe=recipe, overwrite=True, progress=False, shared=shared)


@pytest.fixture
def pruning(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Pruning:
    """Prunes without processes, and leaves the plots out where a test does not ask to look at them."""
    here = Pruning()
    monkeypatch.setattr(module, "_prune", here)
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(module, "write_plots", lambda comparison: [])
    return here


@pytest.fixture
def drawn() -> None:
    """Asked for by tests that look at the plots, which take longer than pruning a tiny model."""


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((out / "results.json").read_text())["cells"]}


def test_equals_prune_and_perplexity_one_by_one(
    pruning: Pruning, drawn: None, tiny: Path, tmp_path: Path, text: str
) -> None:
    out = tmp_path / "out"
    options = SHARED | {"calibration": text, "text": text}
    found = wanda.compare(tiny, out=out, methods=["magnitude", "wanda"], sparsity=0.6, pattern="2:4", **options)
    assert [row["name"] for row in found.rows] == ["dense", "magnitude 60%", "magnitude 2:4", "wanda 60%", "wanda 2:4"]
    rows = results(out)
    measured = {"text": text, "seqlen": 24, "windows": 6, "dtype": "float32"}
    assert rows["dense"]["perplexity"] == pytest.approx(perplexity(tiny, **measured).perplexity, rel=1e-6)
    for method, extent in itertools.product(("magnitude", "wanda"), ({"sparsity": 0.6}, {"pattern": "2:4"})):
        row = rows[f"{method} {extent.get('pattern', '60%')}"]
        folder = tmp_path / f"{row['key']}"
        report: Any = wanda.prune(
            tiny, out=folder, method=method, calibration=text, samples=4, seqlen=24, dtype="float32", progress=False,
            **extent,
        )  # fmt: skip
        assert row["perplexity"] == pytest.approx(perplexity(folder, **measured).perplexity, rel=1e-6)
        assert row["sparsity"] == report.sparsity and row["error"] is None
        assert (row["relative_error"] is None) == (method == "magnitude")
    assert not (out / "models").exists()
    lines = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert [(line["method"], line["pattern"]) for line in lines[1:]] == [
        (method, pattern) for method in ("magnitude", "wanda") for pattern in ("", "2:4")
    ]
    assert [float(line["perplexity"]) for line in lines] == [row["perplexity"] for row in rows.values()]
    table = (out / "results.md").read_text()
    assert all(f"{row['perplexity']:.2f}" in table for row in rows.values()) and "text.txt" in table
    for folder in (tmp_path, Path(text).parent, tiny.parent):  # results name no folder of the machine
        assert str(folder) not in table + (out / "results.json").read_text()
    assert "not used, since magnitude needs no calibration: --calibration text.txt" in table
    for name in ("sparsity", "seconds"):
        assert (out / f"perplexity-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_packed_models_are_measured_as_they_would_ship(pruning: Pruning, tiny: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    options = SHARED | {"calibration": text, "text": text, "methods": "magnitude", "sparsity": [0.5, 0.0]}
    plain = {row["name"]: row for row in wanda.compare(tiny, out=out, **options).rows}
    before = len(pruning.folders)
    found = {row["name"]: row for row in wanda.compare(tiny, out=out, packed=True, keep=True, **options).rows}
    assert len(pruning.folders) == before + 2  # the dense model is the same one
    kept = out / "models" / next(name for name in pruning.folders[before:] if "50" in name)
    summary = pack(str(kept), tmp_path / "packed")
    sizes = [sum(file.stat().st_size for file in at.glob("*.safetensors")) for at in (tmp_path / "packed", kept)]
    assert found["magnitude 50%"]["packed_size"] == pytest.approx(sizes[0] / sizes[1], rel=0.05)
    assert summary.packed and 0.5 < found["magnitude 50%"]["packed_size"] < 0.8
    assert found["magnitude 0%"]["packed_size"] == 1 and found["dense"]["packed_size"] is None
    for name, row in found.items():
        assert row["perplexity"] == pytest.approx(plain[name]["perplexity"], rel=1e-5) and not row["error"]
        assert (row["key"] == plain[name]["key"]) == (name == "dense")
    assert "packed size" in (out / "results.md").read_text()
    assert not list((out / "models").glob("*.packed"))
    with pytest.raises(ConfigurationError, match=r"--packed: .*cannot be computed in bfloat16; choose float32"):
        wanda.compare(tiny, out=tmp_path / "other", **options | {"dtype": "bfloat16"}, packed=True)
    with pytest.raises(ConfigurationError, match="--packed: packed models run on the CPU, the comparison on meta"):
        wanda.compare(tiny, out=tmp_path / "other", **options | {"device": "meta"}, packed=True)


def test_cells_share_the_calibration_and_the_dense_pass(
    pruning: Pruning, tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OWL's figures and the token ids are made once a sample; the models are those of runs by themselves."""
    made: list[str] = []

    def counting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    counting(calibration, "token_ids")
    counting(block_loop.BlockLoop, "_measures")
    out, options = tmp_path / "out", {"calibration": text, "sparsity": [0.5, 0.6], "seeds": [0, 1], "keep": True}
    found = wanda.compare(tiny, out=out, text=text, methods=["owl", "wanda"], **SHARED | options)
    assert sorted(made) == ["_measures"] * 2 + ["token_ids"] * 2  # two seeds
    shares = [any("owl's figures" in note for note in row["notes"]) for row in found.rows]
    assert sum(shares) == 2 and not shares[1]  # the dense model's row comes first
    made.clear()
    for row, folder in zip(found.rows[1:5], pruning.folders, strict=False):
        alone = tmp_path / "alone" / folder
        recipe = Recipe.from_file(out / "models" / folder / "wanda.json")
        wanda.prune(tiny, out=alone, recipe=recipe, progress=False)
        assert row["name"].startswith("owl")
        shards = sorted(file.name for file in alone.glob("*.safetensors"))
        assert shards == sorted(file.name for file in (out / "models" / folder).glob("*.safetensors"))
        for name in shards:
            assert (alone / name).read_bytes() == (out / "models" / folder / name).read_bytes()
    assert len(made) == 8


def test_a_cell_ends_when_its_comparison_was_killed(tiny: Path, tmp_path: Path) -> None:
    """What holds its standard input: while somebody does, it runs to its end."""
    for held in (True, False):
        out = tmp_path / str(held)
        command = [sys.executable, "-m", "wanda", "prune", str(tiny), "--out", str(out), "--method", "magnitude"]
        with subprocess.Popen([*command, "--shared", str(tmp_path)], stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            if not held:
                process.stdin.close()
            assert process.wait() == (0 if held else 1)
            assert out.exists() == held


def test_goes_on_after_a_stop_without_redoing_cells(
    pruning: Pruning, tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "calibration.txt"
    file.write_text(Path(text).read_text())
    out = tmp_path / "out"
    options = SHARED | {"calibration": str(file), "text": text, "methods": ["wanda", "ria"], "sparsity": [0.5, 0.6]}
    pruning.instead = {2: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        wanda.compare(tiny, out=out, **options)
    assert list(results(out)) == ["dense", "wanda 50%"] and list((out / "models").iterdir()) == []
    first = results(out)

    measure = module._measure
    monkeypatch.setattr(module, "_measure", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        wanda.compare(tiny, out=out, **options)  # stopped while it measures: the model is pruned already
    monkeypatch.setattr(module, "_measure", measure)
    assert len(pruning.folders) == 3
    done = wanda.compare(tiny, out=out, **options)
    assert [name.rpartition("-")[0] for name in pruning.folders[3:]] == ["ria-50", "ria-60"]
    assert list(results(out)) == ["dense", "wanda 50%", "wanda 60%", "ria 50%", "ria 60%"]
    assert results(out) | first == results(out) and not (out / "models").exists()

    file = file.rename(tmp_path / "renamed.txt")  # the same text
    again = wanda.compare(tiny, out=out, **options | {"calibration": str(file), "methods": "ria"})
    assert len(pruning.folders) == 5 and [row["name"] for row in again.rows] == ["dense", "ria 50%", "ria 60%"]
    more = wanda.compare(tiny, out=out, **options | {"calibration": str(file), "windows": 5})
    assert len(pruning.folders) == 9 and more.rows[0]["perplexity"] != done.rows[0]["perplexity"]
    whole = wanda.compare(tiny, out=out, **options | {"calibration": str(file)})
    assert len(pruning.folders) == 9 and "5 cells of earlier comparisons" in whole.notes[0]
    assert [row["perplexity"] for row in whole.rows] == [row["perplexity"] for row in done.rows]


@pytest.mark.parametrize("packed", [False, True])
def test_goes_on_in_the_middle_of_a_text(
    pruning: Pruning, tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    options = SHARED | {"calibration": text, "text": text, "methods": "magnitude", "packed": packed}
    monkeypatch.setattr(perplexity_module, "_BATCH_LOGITS", 2 * 24 * 300)  # two windows a pass
    whole = wanda.compare(tiny, out=tmp_path / "whole", **options)
    monkeypatch.setattr(module, "_OFTEN", 0.0)
    passes: list[int] = []
    logits = perplexity_module._logits
    monkeypatch.setattr(perplexity_module, "_logits", lambda m, ids: passes.append(len(ids)) or logits(m, ids))
    now = Board.now
    for stop, (cell, window) in enumerate((("dense", 4), ("magnitude 50%", 6))):

        def stopping(self: Board, number: int, state: str, stop: int = stop, window: int = window) -> None:
            now(self, number, state)
            if number == stop and state == f"measuring: window {window}/6":
                raise KeyboardInterrupt

        monkeypatch.setattr(Board, "now", stopping)
        with pytest.raises(KeyboardInterrupt):
            wanda.compare(tiny, out=tmp_path / "out", **options)
        assert cell not in results(tmp_path / "out")
    monkeypatch.setattr(Board, "now", now)
    found = wanda.compare(tiny, out=tmp_path / "out", **options)
    assert passes == [2] * 6 and len(pruning.folders) == 2  # each window once
    assert [row["perplexity"] for row in found.rows] == [row["perplexity"] for row in whole.rows]
    assert not (tmp_path / "out" / "models").exists()


def test_what_is_chosen_for_lack_of_memory_makes_no_other_cell(tiny: Path, tmp_path: Path, text: str) -> None:
    setting = Setting(calibration=text, text=text, seqlen=24, windows=6, dtype="float32")
    keys = []
    for choices in (Choices("layer", 1, False), Choices("block", 1, True)):
        plans = module._plans(str(tiny), tmp_path / "out", [Grid(methods=("wanda",), samples=(4,))], setting)
        for _, plan in plans:
            plan.take(choices)
        keys.append([cell.key for cell in module._cells(plans, torch.zeros(6, 24, dtype=torch.int64), Setting())])
    assert len(keys[0]) == 2 and keys[0] == keys[1]


@pytest.mark.parametrize(
    ("method", "axes", "expected"),
    [
        ("wanda", {"score": "obs"}, "obs"),
        ("wanda", {"score": "obs", "group": "column"}, "obs group=column"),
        ("wanda", {"score": "magnitude", "update": "pcg"}, "magnitude update=pcg"),
        ("ria", {"score": "wanda"}, "ria score=wanda"),  # in ria's group
        ("ria", {"score": "wanda", "group": "row"}, "wanda group=row"),
        ("owl", {"score": "ria"}, "owl score=ria"),
        ("sparsegpt", {"score": "wanda"}, "sparsegpt score=wanda"),
        ("wnda", {"score": "obs"}, "wnda score=obs"),
        ("wanda", {}, "wanda"),
    ],
)
def test_labels_name_what_is_left_of_a_method(method: str, axes: dict[str, str], expected: str) -> None:
    assert label(Recipe(method=method, **axes)) == expected


def test_grids_without_sense_are_told_with_everything_else(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        wanda.compare(tiny, out=tmp_path / "out", propagate="sideways", text="wikitex", windows=0, progress=False)
    for part in ("sideways is not a way", "no method is named", "did you mean wikitext2", "--windows 0"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_of_finished_cells_are_not_kept_and_that_is_said(
    pruning: Pruning, tiny: Path, tmp_path: Path, text: str
) -> None:
    options = SHARED | {"calibration": text, "text": text, "methods": ["magnitude"], "sparsity": 0.5}
    wanda.compare(tiny, out=tmp_path / "out", **options)
    again = wanda.compare(tiny, out=tmp_path / "out", keep=True, memory="64GB", **options)
    assert len(pruning.folders) == 1 and any(
        "--keep keeps" in note and "2 were finished" in note for note in again.notes
    )


def test_failed_cells_do_not_stop_the_others_and_are_tried_again(
    pruning: Pruning, tiny: Path, tmp_path: Path, text: str
) -> None:
    options = SHARED | {"calibration": text, "text": text, "methods": ["wanda", "ria"], "keep": True}
    pruning.instead = {1: RunError("the disk is full")}
    with pytest.raises(RunError, match=r"1 of 3 cells failed(.|\n)*wanda 50%: the disk is full"):
        wanda.compare(tiny, out=tmp_path, **options)
    assert "- wanda 50%: the disk is full" in (tmp_path / "results.md").read_text()
    assert results(tmp_path)["wanda 50%"]["perplexity"] is None and results(tmp_path)["ria 50%"]["perplexity"] > 1
    wanda.compare(tiny, out=tmp_path, **options)
    assert [name.partition("-")[0] for name in pruning.folders] == ["wanda", "ria", "wanda"]
    assert sorted(folder.name.partition("-")[0] for folder in (tmp_path / "models").iterdir()) == ["ria", "wanda"]
    assert perplexity(next((tmp_path / "models").glob("ria*")), text, seqlen=24, windows=6, dtype="float32") is not None


def test_seeds_are_summarised_and_cells_without_calibration_run_once(
    pruning: Pruning, drawn: None, tiny: Path, tmp_path: Path, text: str
) -> None:
    options = SHARED | {"samples": (2, 3), "calibration": text, "text": text}
    found = wanda.compare(tiny, out=tmp_path / "out", methods=("magnitude", "wanda"), seeds=(0, 1), **options)
    expected = [f"wanda 50%, {samples} samples, seed {seed}" for samples in (2, 3) for seed in (0, 1)]
    assert [row["name"] for row in found.rows] == ["dense", "magnitude 50%", *expected]
    rows = found.over_seeds()
    assert [(row["name"], row["samples"], row["seeds"]) for row in rows] == [("wanda", 2, 2), ("wanda", 3, 2)]
    values = [row["perplexity"] for row in found.rows if row["name"] in expected[:2]]
    assert len(set(values)) == 2
    assert rows[0]["mean"] == pytest.approx(sum(values) / 2) and rows[0]["most"] == max(values)
    assert rows[0]["deviation"] == pytest.approx(statistics.stdev(values))
    assert f"| {rows[0]['mean']:.2f} | {rows[0]['deviation']:.2f} |" in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "perplexity-samples.png").exists()


def test_presets_are_the_studies_of_the_paper() -> None:
    def cells(preset: Any, **axes: Any) -> list[dict[str, Any]]:
        recipes = list(Grid(preset=preset, **axes).recipes(Setting()))
        assert all(not recipe.faults() for recipe in recipes)
        return [recipe.resolved().as_dict() for recipe in recipes]

    groups = cells("groups")
    assert {(r["score"], r["group"], r["update"], r["sparsity"]) for r in groups} == set(
        itertools.product(("magnitude", "wanda", "obs"), ("layer", "row", "column", "block:128"), ["none"], [0.5])
    )
    updates = cells("updates")
    assert {(r["score"], r["update"]) for r in updates} == set(
        itertools.product(("magnitude", "wanda"), ("none", "obs-sequential", "obs"))
    )
    samples = cells("samples")
    assert {r["samples"] for r in samples} == {1, 4, 16, 64, 128, 256} and {r["update"] for r in samples} > {"none"}
    sparsity = cells("sparsity")
    assert sorted({r["sparsity"] for r in sparsity}) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert {r["method"] for r in sparsity} == {"magnitude", "wanda", "sparsegpt"}
    assert [len(each) for each in (groups, updates, samples, sparsity)] == [12, 6, 12, 24] and len(PRESETS) == 4
    named = cells("updates", pattern=("2:4",), methods=("wanda",))
    assert [(r["method"], r["pattern"], r["sparsity"]) for r in named] == [("wanda", "2:4", None)] * 3


def test_all_faults_of_all_cells_before_anything_is_written(pruning: Pruning, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a few words")
    options = {"text": str(tmp_path / "text.tx"), "calibration": "builtin", "windows": 0, "progress": False}
    with pytest.raises(ConfigurationError) as stop:
        methods = ["owl", "best", "wnda"]
        wanda.compare(tiny, out=tmp_path / "out", methods=methods, scores="ria", pattern=["2:4", "5:7"], **options)
    faults = stop.value.faults
    for cell, part in (
        ("owl score=ria 2:4", "the allocation owl cannot vary the pattern 2:4"),
        ("owl score=ria 5:7", "the allocation owl cannot vary the pattern 5:7"),
        ("best score=ria 2:4; best score=ria 5:7", "the score ria would be ignored"),
        ("wnda score=ria 2:4; wnda score=ria 5:7", "did you mean wanda"),
        ("owl score=ria 5:7", "not a multiple of 7"),
        ("", "did you mean text.txt"),
        ("", "--windows 0"),
    ):
        assert [fault for fault in faults if fault.startswith(cell) and part in fault], (cell, part)
    assert len(faults) == len(set(faults)) == 7 and not (tmp_path / "out").exists() and not pruning.folders
    for wrong, message in (
        ({}, "no method is named"),
        ({"methods": "wanda", "sparsities": 0.5}, "there is no option 'sparsities': did you mean sparsity"),
        ({"methods": "wanda", "propagate": "layers"}, "block or layer"),
        ({"preset": "group"}, "did you mean groups"),
        ({"methods": "wanda", "text": str(tmp_path / "text.txt"), "calibration": "builtin"}, "a window 128"),
        ({"grids": [Grid(methods=("wanda",))], "methods": "wanda"}, "would be ignored beside grids"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            wanda.compare(tiny, out=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(pruning: Pruning, tiny: Path, tmp_path: Path, text: str) -> None:
    options = SHARED | {"calibration": text, "text": text, "methods": "magnitude"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"format": 99}')
    for out, message in (("full", "not empty"), ("other", "holds no comparison"), ("full/thesis.txt", "is a file")):
        with pytest.raises(ConfigurationError, match=message):
            wanda.compare(tiny, out=tmp_path / out, **options)
    with pytest.raises(ConfigurationError, match="input itself"):
        wanda.compare(tiny, out=tiny, **options)
    (tmp_path / "busy").mkdir()
    held = os.open(tmp_path / "busy", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ConfigurationError, match="another comparison"):
        wanda.compare(tiny, out=tmp_path / "busy", **options)
    os.close(held)
    assert not pruning.folders


def test_a_folder_that_is_added_to_may_be_a_mount_and_hold_the_text(
    pruning: Pruning, tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    options = SHARED | {"calibration": text, "text": text, "methods": "wanda", "out": tmp_path}
    wanda.compare(tiny, **options)
    (tmp_path / "text.txt").write_text(Path(text).read_text())
    found = wanda.compare(tiny, **options | {"calibration": str(tmp_path / "text.txt"), "sparsity": [0.5, 0.6]})
    assert len(pruning.folders) == 2 and all(row["perplexity"] for row in found.rows)


def test_room_is_asked_for_what_is_still_to_be_pruned(
    pruning: Pruning, tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    options = SHARED | {"calibration": text, "text": text, "out": tmp_path / "out", "methods": "magnitude"}
    for free, asked, fits in (
        (0, {"sparsity": [0.5, 0.6]}, False),
        (1.5, {"sparsity": [0.5, 0.6], "keep": True}, False),
        (1.5, {"sparsity": [0.5, 0.6], "packed": True}, False),
        (1.5, {"sparsity": [0.5, 0.6]}, True),
        (0, {"sparsity": [0.5, 0.6]}, True),  # all are there
        (1.5, {"sparsity": [0.5, 0.6, 0.7], "keep": True}, True),  # one is missing
    ):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=int(free * size)))
        if fits:
            wanda.compare(tiny, **options, **asked)
            continue
        with pytest.raises(ConfigurationError, match=r"to be pruned: .* MB are needed, .*free some space"):
            wanda.compare(tiny, **options, **asked)
        assert not (tmp_path / "out").exists()
    monkeypatch.undo()


def test_a_disk_that_is_full_while_measuring_costs_one_cell(
    pruning: Pruning, tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SHARED | {"calibration": text, "text": text, "methods": "magnitude", "sparsity": [0.5, 0.6]}
    monkeypatch.setattr(module, "_OFTEN", 0.0)
    replace = output.replace_file

    def full(file: Path, content: str) -> None:
        if "magnitude-50" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(file, content)

    monkeypatch.setattr(output, "replace_file", full)
    with pytest.raises(RunError, match=r"1 of 3 cells failed(.|\n)*magnitude 50%: .*No space left"):
        wanda.compare(tiny, out=tmp_path, **options)
    monkeypatch.setattr(output, "replace_file", replace)
    assert all(row["perplexity"] for row in wanda.compare(tiny, out=tmp_path, **options).rows)


def test_tables_without_matplotlib(
    pruning: Pruning, drawn: None, tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "matplotlib" else object())
    out = tmp_path / "out"
    found = wanda.compare(tiny, out=out, methods="magnitude", text=text, **SHARED | {"calibration": "builtin"})
    assert "pip install 'wanda-prune[plots]'" in found.notes[0] and found.notes[0] in (out / "results.md").read_text()
    assert not list(out.glob("*.png")) and len(results(out)) == 2


def test_board_on_a_terminal_shows_what_is_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    board = Board([f"wanda {n}%" for n in range(40)])
    board.console = Console(file=stream, force_terminal=True, width=100, height=20)
    with board:
        row = {"perplexity": 12.345, "seconds": 3.21, "peak_memory_bytes": 5e8, "error": None}
        for number in range(21):
            board.done(number, row)
        board.now(21, "pruning")
        board.now(21, "pruning: block 3/30")
    shown = stream.getvalue().rpartition("21 of 40 cells")[2]
    assert "wanda 21%" in shown and "block 3/30" in shown and "12.35" in shown and "wanda 39%" not in shown
