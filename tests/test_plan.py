"""What memory decides: refusals that say what to do, and fallbacks that are told and kept by a resumed run."""

from __future__ import annotations

import hashlib
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import wanda.plan
from models import tiny_llama
from wanda.activations import Activations
from wanda.block_loop import BlockLoop
from wanda.device import available_memory
from wanda.errors import ConfigurationError
from wanda.pipeline import prune
from wanda.plan import Choices, Plan
from wanda.recipe import Recipe
from wanda.statistics import Needs

SAMPLES, SEQLEN, BATCH, WIDTH = 4, 24, 2, 32
RESIDENT = 400 << 20
BETWEEN = SAMPLES * SEQLEN * WIDTH * 4  # bytes of the hidden states between two blocks
OPTIONS: dict[str, Any] = {
    "samples": SAMPLES,
    "seqlen": SEQLEN,
    "batch": BATCH,
    "dtype": "float32",
    "progress": False,
}
AMPLE = 1 << 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(autouse=True)
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sets what the machine has available; a process of constant size, else the figures would follow the suite."""
    monkeypatch.setattr(wanda.plan, "resident_memory", lambda: RESIDENT)

    def give(amount: int | None) -> None:
        monkeypatch.setattr(wanda.plan, "available_memory", lambda device: amount)

    give(AMPLE)
    return give


def plan_of(source: Path, text: str, **options: Any) -> Plan:
    plan = prune(source, out=source.parent / "plan", dry_run=True, **OPTIONS | {"calibration": text} | options)
    assert isinstance(plan, Plan)
    return plan


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors*")}


@pytest.mark.parametrize("method, tensors", [("sparsegpt", 2), ("best", 3)])  # Gram matrix and factor; the lag too
def test_too_little_for_a_gram_matrix_names_the_layer_its_size_and_what_to_choose(
    method: str, tensors: int, text: str, tmp_path: Path
) -> None:
    wide = tiny_llama(tmp_path / "dense", intermediate_size=2048, num_hidden_layers=1)
    with pytest.raises(ConfigurationError) as caught:
        plan_of(wide, text, method=method, memory="100MB")
    message = str(caught.value)
    assert "model.layers.0.mlp.down_proj (2048 inputs)" in message
    assert f"take {tensors * 4 * 2048**2 / 1e6:.1f} MB" in message
    assert "--exclude 'model.layers.*.mlp.down_proj'" in message and "a larger --memory" in message
    least, without = re.findall(r"the least is ([\d.]+GB)", message)
    plan_of(wide, text, method=method, memory=least)
    plan_of(wide, text, method="wanda", memory=without)
    with pytest.raises(ConfigurationError, match="down_proj"):
        plan_of(wide, text, method=method, memory=without)


def test_a_refusal_without_gram_matrices_does_not_speak_of_them(source: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--memory 1MB is too little.*the least is .*GB.*--seqlen") as caught:
        plan_of(source, text, memory="1MB")
    assert "Gram" not in str(caught.value)


def test_what_the_machine_has_is_the_limit_where_none_is_given(
    source: Path, text: str, available: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ample = plan_of(source, text)
    assert (ample.recipe.propagate, ample.batch, ample.activation_folder) == ("layer", BATCH, None)
    assert ample.notes == [] and ample.recipe == ample.asked
    spare = ample.memory - RESIDENT

    available(spare)
    assert plan_of(source, text).choices == ample.choices
    available(spare - 1)  # not enough for all activations
    filed = plan_of(source, text)
    assert filed.activation_folder == source.parent and filed.recipe.propagate == "layer" and filed.batch == BATCH
    assert any("the available memory" in n and "go to a file" in n and "--memory sets" in n for n in filed.notes)
    available(spare - BETWEEN - 1)  # nor for the intermediate ones
    two = plan_of(source, text)
    assert two.recipe.propagate == "block" and two.activation_folder is None and two.batch == BATCH
    assert two.asked.propagate == "layer" and any("--propagate block" in note for note in two.notes)
    available(two.memory - RESIDENT - BETWEEN - 1)
    one = plan_of(source, text)
    assert (one.recipe.propagate, one.batch, one.recipe.batch) == ("block", 1, 1)
    available(100 << 20)  # less than libraries take on the way
    with pytest.raises(ConfigurationError, match=r"the available memory \(524 MB\) is too little.*the least is 0.6"):
        plan_of(source, text)
    assert plan_of(source, text, memory="1GB").choices == ample.choices  # the user's word goes
    available(None)
    assert plan_of(source, text).choices == ample.choices
    available(spare - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert plan_of(source, text).choices == two.choices  # no file without room for it


def test_processes_of_one_machine_share_its_memory(
    source: Path, text: str, tmp_path: Path, available: Callable[[int | None], None]
) -> None:
    recipe = Recipe(calibration=text, samples=SAMPLES, seqlen=SEQLEN, batch=BATCH, dtype="float32")
    alone = wanda.plan.make_plan(source, tmp_path / "out", recipe)
    available(alone.memory - RESIDENT)
    assert wanda.plan.make_plan(source, tmp_path / "out", recipe).notes == []
    with pytest.raises(ConfigurationError, match="a process"):
        wanda.plan.make_plan(source, tmp_path / "out", recipe, neighbours=2)


def test_a_device_has_a_limit_of_its_own(source: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanda.plan, "pick_device", lambda name: torch.device("meta"))
    plan = plan_of(source, text)
    assert 0 < plan.device_memory < 1e6 and plan.memory > RESIDENT  # libraries and activations between blocks: here
    sizes = {"cpu": AMPLE, "meta": plan.device_memory - 1}
    monkeypatch.setattr(wanda.plan, "available_memory", lambda device: sizes[device.type])
    for memory in (None, "1GB"):
        less = plan_of(source, text, memory=memory)
        assert less.recipe.propagate == "block" and any("the free memory of meta" in note for note in less.notes)
    sizes["meta"] = 1000
    with pytest.raises(ConfigurationError, match=r"the free memory of meta \(1 kB\) is too little"):
        plan_of(source, text)


def test_rows_judged_by_themselves_take_memory_for_a_panel_only(
    source: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanda.composition._PANEL", 1)  # a row
    rows, whole = plan_of(source, text), plan_of(source, text, group="layer")
    matrices = [matrix for block in rows.matrices for matrix in block]
    widest, largest = max(matrix.width for matrix in matrices), max(matrix.numel for matrix in matrices)
    assert whole.memory - rows.memory == 16 * (largest - widest)


def test_owl_counts_its_stream_and_every_estimate_the_token_ids(source: Path, text: str) -> None:
    assert plan_of(source, text, method="owl").memory - plan_of(source, text).memory == BETWEEN
    filed = []
    for samples in (SAMPLES, 10 * SAMPLES):
        plan = plan_of(source, text, samples=samples, propagate="block")
        plan.take(Choices("block", BATCH, True))
        filed.append(wanda.plan._estimate(plan, Needs.NORMS)[0])
    assert filed[1] - filed[0] == 9 * SAMPLES * SEQLEN * 8


def test_what_enters_the_first_block_goes_to_the_file_at_once(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Tensor]] = []
    append = Activations.append

    def watched(self: Activations, tensor: Tensor) -> None:
        seen.append(weakref.ref(tensor))
        assert sum(ref() is not None for ref in seen) <= 2  # this one and the one before, whose turn just ended
        append(self, tensor)

    monkeypatch.setattr(Activations, "append", watched)
    many: dict[str, Any] = {"samples": 8, "batch": 1}
    cap = f"{plan_of(source, text, **many).memory - 1}"
    report = prune(source, out=tmp_path / "out", memory=cap, calibration=text, **OPTIONS | many)
    assert any("go to a file" in note for note in report.notes) and len(seen) == 8


def test_a_resumed_run_keeps_the_choices_it_began_with(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"calibration": text, "batch": None}  # 42 sequences a micro-batch
    plan = prune(source, out=tmp_path / "plan", dry_run=True, **options)
    cap = f"{plan.memory - BETWEEN - 1}"
    whole = prune(source, out=tmp_path / "whole", memory=cap, **options)
    assert whole.recipe["propagate"] == "block" and whole.recipe["batch"] == 1
    unlimited = Recipe.from_dict(whole.recipe | {"memory": None})
    prune(source, out=tmp_path / "again", recipe=unlimited, progress=False)
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")  # the report's recipe says what was done

    block = BlockLoop._prune

    def stop(self: BlockLoop, index: int, *arguments: Any) -> None:
        if index == 2:
            raise KeyboardInterrupt
        block(self, index, *arguments)

    for resident in (RESIDENT // 2, 2 * RESIDENT):  # as asked would fit now; nothing would
        monkeypatch.setattr(wanda.plan, "resident_memory", lambda: RESIDENT)
        out = tmp_path / f"out{resident}"
        with monkeypatch.context() as patch:
            patch.setattr(BlockLoop, "_prune", stop)
            with pytest.raises(KeyboardInterrupt):
                prune(source, out=out, memory=cap, **options)
        monkeypatch.setattr(wanda.plan, "resident_memory", lambda given=resident: given)
        with pytest.raises(ConfigurationError, match=r"another recipe \(propagate\)"):
            prune(source, out=out, memory=cap, resume=True, propagate="none", **options)
        report = prune(source, out=out, memory=cap, resume=True, **options)
        assert digests(out) == digests(tmp_path / "whole") and report.recipe == whole.recipe
        assert any("as the run began: " in note and "--batch 1" in note for note in report.notes)


def test_a_method_whose_repair_is_for_nothing_says_so(source: Path, text: str) -> None:
    said = "hands no error on, so that best repairs no inherited errors"
    assert any(said in note for note in plan_of(source, text, method="best", propagate="none").notes)
    assert not any(said in note for note in plan_of(source, text, method="best").notes)
    assert not any(said in note for note in plan_of(source, text, method="fast", propagate="none").notes)


def test_choices_that_another_version_journaled_are_refused(
    source: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wanda.plan, "journaled", lambda out: {"choices": {"passes": 2}})
    with pytest.raises(ConfigurationError, match=r"another version.*--overwrite"):
        prune(source, out=tmp_path / "out", resume=True, calibration=text, **OPTIONS)


def test_the_plan_is_printed_before_a_run_that_memory_has_a_say_in(
    source: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], available: Callable[[int | None], None]
) -> None:
    options = OPTIONS | {"calibration": text, "progress": True}
    prune(source, out=tmp_path / "plain", **options)
    assert "of memory" not in capsys.readouterr().err
    prune(source, out=tmp_path / "given", memory="8GB", **options)
    told = capsys.readouterr()
    assert told.out == "" and "of memory" in told.err.partition("block 1/4")[0]
    assert max(map(len, told.err.partition("block 1/4")[0].splitlines())) <= 80
    available(plan_of(source, text).memory - RESIDENT - 1)
    prune(source, out=tmp_path / "short", **options)
    assert "activations go to a file" in capsys.readouterr().err.partition("block 1/4")[0]


def test_files_that_were_read_count_as_available_in_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8000 kB\n",
        "sys/fs/cgroup/memory.max": "5000000\n",
        "sys/fs/cgroup/memory.current": "4000000\n",
        "sys/fs/cgroup/memory.stat": "anon 1000000\nactive_file 500000\ninactive_file 2500000\nfile 3000000\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr("wanda.device.Path", lambda path: tmp_path / path.lstrip("/"))
    assert available_memory(torch.device("cpu")) == 4_000_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert available_memory(torch.device("cpu")) == 8000 * 1024
