"""Compositions that make no sense are told, all faults at once; everything else is let through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from problems import gathered, inputs, weights
from wanda.allocation import ALLOCATIONS
from wanda.composition import Composition, faults
from wanda.errors import RunError
from wanda.methods import METHODS
from wanda.patterns import NM, Pattern, Unstructured, exact
from wanda.scores import SCORES
from wanda.statistics import Needs
from wanda.updates import UPDATES


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "sparsgpt"}, "unknown method 'sparsgpt': did you mean sparsegpt"),
        ({"score": "wnada"}, "unknown score 'wnada': did you mean wanda"),
        ({"update": "pgc"}, "unknown update 'pgc': did you mean pcg"),
        ({"update": "swap+pgc"}, "unknown update 'pgc'"),
        ({"update": "swap+"}, "unknown update ''"),
        ({"allocation": "owls"}, "unknown allocation 'owls': did you mean owl"),
        ({"group": "rows"}, "unknown group 'rows'"),
        (
            {"score": "wanda", "update": "admm-iterative"},
            "chooses its mask itself, so the score wanda would be ignored",
        ),
        ({"method": "best", "update": "pcg"}, "needs a score"),
        ({"update": "pcg+obs"}, "obs chooses a mask anew and cannot come after pcg"),
        ({"update": "pcg+admm-iterative"}, "admm-iterative chooses a mask anew"),
        ({"update": "pcg+none"}, "none chooses a mask anew"),
        ({"update": "pcg+admm"}, "pcg before it, which keeps the mask, would be for nothing"),
        ({"update": "obs+pcg+obs-sequential"}, "pcg before it, which keeps the mask, would be for nothing"),
        ({"update": "swap", "group": "column"}, "breaks the counts of the group column"),
        ({"update": "swap", "method": "sparsegpt"}, "breaks the counts of the group block:128"),
        ({"pattern": "2:4", "allocation": "owl"}, "owl cannot vary the pattern 2:4"),
        ({"pattern": "2:4", "method": "owl"}, "owl cannot vary the pattern 2:4"),
        ({"pattern": "2:4", "variant": True}, "the variant gives rows different counts"),
        ({"pattern": "2:4", "group": "layer"}, "the group layer would be ignored"),
        ({"pattern": "4:2"}, "did you mean 2:4"),
        ({"pattern": "2:4", "sparsity": 0.6}, "removes 0.5 of the weights and cannot reach 0.6"),
        ({"variant": True, "group": "layer"}, "the variant is made of rows"),
        ({"sparsity": 1.0}, "not in [0, 1)"),
        ({"sparsity": -0.1}, "not in [0, 1)"),
        ({"sparsity": "half"}, "no number"),
        ({"inherit": 1.5, "update": "pcg"}, "not a share from 0 to 1"),
        ({"inherit": 0.5}, "repaired by an update, none solves nothing"),
    ],
)
def test_a_fault_is_told(options: dict, told: str) -> None:
    found = faults(**options)
    assert len(found) == 1 and told in found[0]


def test_all_faults_at_once() -> None:
    found = faults(score="x", update="y", pattern="4:2", allocation="z", inherit=2, variant=True, sparsity=3)
    assert len(found) == 7


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_makes_sense(method: str) -> None:
    assert faults(method=method) == [] and faults(method=method, sparsity="0.7") == []
    found = faults(method=method, pattern="2:4", sparsity=0.5)
    assert found == [] or METHODS.get(method).allocation != "uniform"


def test_every_pair_of_score_and_update_makes_sense_unless_the_update_owns_its_mask() -> None:
    for score in SCORES.names():
        for update in UPDATES.names():
            for options in ({"pattern": "2:4"}, {"sparsity": 0.5}, {"sparsity": 0.5, "variant": True}):
                found = faults(score=score, update=update, **options)
                assert bool(found) == UPDATES.get(update).owns_mask
    for allocation in ALLOCATIONS.names():
        assert faults(allocation=allocation) == []


def test_needs_are_the_largest_of_the_parts() -> None:
    assert Composition("magnitude").needs == Needs.NOTHING
    assert Composition("wanda").needs == Needs.NORMS
    assert Composition("magnitude", "pcg").needs == Needs.GRAM
    assert Composition("obs").needs == Needs.GRAM
    assert Composition(None, "admm-iterative+pcg").needs == Needs.GRAM


def test_numbers_that_are_not_finite_stop_the_run_by_name() -> None:
    x, w = inputs(50, 8), weights(4, 8)
    x[3, 2] = float("inf")
    for composition in (Composition("wanda"), Composition("magnitude", "obs"), Composition(None, "admm-iterative")):
        with pytest.raises(RunError, match=r"not finite|overflowed"):
            composition.prune(w, gathered(x, needs=composition.needs), Unstructured(exact("0.5")), "layers.0.q")


def test_the_error_from_norms_is_an_estimate() -> None:
    x, w = inputs(50, 8), weights(4, 8)
    result = Composition("wanda").prune(w, gathered(x, needs=Needs.NORMS), Unstructured(exact("0.5")), "q")
    norm = x.square().sum(dim=0)
    expected = float(((w - result.weight).square() @ norm).sum() / (w.square() @ norm).sum())
    assert result.error is not None and not result.error.exact
    assert result.error.relative == pytest.approx(expected, rel=1e-5)
    assert torch.equal(result.weight, torch.where(result.mask, w, 0))


@pytest.mark.parametrize("pattern", [Unstructured(exact("0.5")), NM(2, 4), Unstructured(exact("0.5"), "layer")])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "ria"])
def test_panels_of_rows_give_what_the_whole_matrix_gives(score: str, pattern: Pattern, monkeypatch: Any) -> None:
    monkeypatch.setattr("wanda.composition._PANEL", 24)  # three rows of 8
    x, w = inputs(50, 8), weights(10, 8)
    composition, statistics = Composition(score), gathered(x, needs=Needs.NORMS)
    whole = composition.prune(w, statistics, pattern, "q")
    slices = composition.panels(pattern, 10, 8)
    assert len(slices) == (4 if score != "ria" and pattern.by_row else 1)
    parts = [composition.prune(w[rows], statistics, pattern, "q") for rows in slices]
    assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)
    errors = [part.error for part in parts if part.error is not None]
    assert whole.error is not None and len(errors) == len(parts)
    assert sum(errors[1:], errors[0]).relative == pytest.approx(whole.error.relative, rel=1e-5)


def test_a_score_that_says_nothing_of_rows_sees_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own:
        name, needs = "own", Needs.NOTHING

    monkeypatch.setattr("wanda.composition.SCORES", SimpleNamespace(get=lambda name: Own))
    monkeypatch.setattr("wanda.composition._PANEL", 8)
    assert Composition("own").panels(Unstructured(exact("0.5")), 10, 8) == [slice(0, 10)]


_PEAKS = """
import ctypes, json, re, sys
import torch
from wanda.composition import Composition
from wanda.statistics import Needs, Statistics
from problems import PATTERNS

OUT, WIDTH = 2048, 1024
torch.set_num_threads(1)


def memory(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])


def peak(score, update, inherit, name, out, width):
    composition, pattern = Composition(score, update, inherit), PATTERNS[name]
    weight = torch.randn(out, width).bfloat16()
    statistics = Statistics(width, composition.needs, "cpu", inherit=inherit > 0)
    if composition.needs > Needs.NOTHING:
        x = torch.randn(width, width)
        statistics.update(x, x + 0.1 * torch.randn(width, width) if inherit else None)
        del x
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    rows = composition.panels(pattern, out, width)[0]
    composition.prune(weight[rows].float(), statistics, pattern, "w")
    factors = composition.factor_memory * 4 * width * width if composition.needs == Needs.GRAM else 0
    size = (rows.stop - rows.start) * width
    return (memory("VmHWM") - before - factors) / size, composition.weight_memory(pattern)


for case in json.loads(sys.argv[1]):
    peak(*case, 64, 128)  # what is loaded or made once
    print(json.dumps(peak(*case, OUT, WIDTH)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
def test_what_the_plan_counts_for_a_weight_covers_the_measured_peaks() -> None:
    cases = [
        ("wanda", "none", 0.0, "spread"),
        ("wanda", "none", 0.0, "variant"),
        ("obs", "obs", 0.0, "block"),
        ("wanda", "swap+pcg", 0.5, "row"),
        (None, "admm-relaxed", 0.35, "row"),
        (None, "admm-iterative+pcg", 0.0, "layer"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # or holes in the heap of one case count in the next
    command = [sys.executable, "-c", _PEAKS, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(cases)
    for case, (measured, counted) in zip(cases, found, strict=True):
        assert measured <= counted + 6, (case, measured, counted)  # 12 MB here: panels, heaps
        assert counted <= 3 * max(measured, 6), (case, measured, counted)
