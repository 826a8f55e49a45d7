"""Pruning from checkpoint to checkpoint, held against plain loops over a model that is whole in memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import wanda
from architectures import DENSE, EXPERTS, saved
from models import tiny_llama, tiny_tokenizer
from wanda.calibration import token_ids
from wanda.checkpoint.reader import Checkpoint
from wanda.errors import ConfigurationError, RunError
from wanda.pipeline import prune, prune_model
from wanda.recipe import Recipe
from wanda.statistics import Statistics

SAMPLES, SEQLEN, BATCH = 6, 24, 2
OPTIONS: dict[str, Any] = {"samples": SAMPLES, "seqlen": SEQLEN, "batch": BATCH, "progress": False}
ORDER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ORDER += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = [
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dog",
        "statement",
        "executed",
        "once",
        "every",
        "item",
        "sequence",
        "weights",
        "small",
        "quiet",
    ]
    chosen = torch.randint(len(words), (1500,), generator=torch.Generator().manual_seed(3)).tolist()
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(words[i] for i in chosen), encoding="utf-8")
    return str(file)


def load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokens_of(text: str) -> Tensor:
    return token_ids(text, tiny_tokenizer(), samples=SAMPLES, seqlen=SEQLEN, seed=0)


# The independent implementation: hooks on a whole model, one full forward pass of everything per layer or block.


def square_sums(model: nn.Module, layers: dict[str, nn.Linear], tokens: Tensor) -> dict[str, Tensor]:
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}

    def add(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] += args[0].reshape(-1, args[0].shape[-1]).double().square().sum(dim=0)

        return hook

    handles = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for part in tokens.split(BATCH):
            model(input_ids=part, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def drop_lowest(scores: Tensor, count: int) -> Tensor:
    """A stable sort of every row; True survives."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    for row in range(len(scores)):
        mask[row, scores[row].argsort(stable=True)[:count]] = False
    return mask


def plain_mask(weight: Tensor, sums: Tensor, pattern: str | None, sparsity: float) -> Tensor:
    scores = weight.float().abs() * sums.sqrt().float()
    if pattern is None:
        return drop_lowest(scores, int(scores.shape[1] * sparsity))
    n, m = map(int, pattern.split(":"))
    kept = scores.reshape(len(scores), -1, m).topk(n, dim=2).indices
    return (
        torch.zeros(len(scores), scores.shape[1] // m, m, dtype=torch.bool)
        .scatter_(2, kept, True)
        .reshape(scores.shape)
    )


def plain_wanda(model: Any, tokens: Tensor, propagate: str, pattern: str | None = None, sparsity: float = 0.5) -> None:
    for block in model.model.layers:
        steps = [ORDER] if propagate == "block" else [(name,) for name in ORDER]
        for names in steps:
            layers = {name: block.get_submodule(name) for name in names}
            for name, sums in square_sums(model, layers, tokens).items():
                weight = layers[name].weight.data
                weight[~plain_mask(weight, sums, pattern, sparsity)] = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("propagate", ["block", "layer"])
@pytest.mark.parametrize("pattern", [None, "2:4", "1:4", "3:8"])
def test_masks_equal_a_plain_implementation_entry_by_entry(
    dtype: torch.dtype, propagate: str, pattern: str | None, text: str, tmp_path: Path
) -> None:
    source = tiny_llama(tmp_path / "dense", dtype=dtype)
    compute = str(dtype).removeprefix("torch.")
    prune(
        source, out=tmp_path / "out", calibration=text, propagate=propagate, pattern=pattern, dtype=compute, **OPTIONS
    )
    expected = load(source, dtype)
    plain_wanda(expected, tokens_of(text), propagate, pattern)
    pruned = load(tmp_path / "out", dtype).state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, pruned[name]), name


def test_the_order_of_layers_matters_to_the_masks(text: str, tmp_path: Path) -> None:
    """The two tests of `propagate` above could not tell a walk that ignored it, were the masks the same."""
    source = tiny_llama(tmp_path / "dense")
    masks = []
    for propagate in ("block", "layer"):
        prune(source, out=tmp_path / propagate, calibration=text, propagate=propagate, dtype="float32", **OPTIONS)
        masks.append(load(tmp_path / propagate, torch.float32).model.layers[3].mlp.down_proj.weight != 0)
    assert not torch.equal(*masks)


def plain_variant(scores: Tensor, sparsity: float) -> Tensor:
    """The appendix's bisection, row by row; within 0.001 of the target."""
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        mask = torch.ones_like(scores, dtype=torch.bool)
        for row in range(len(scores)):
            ordered, position = scores[row].double().sort(stable=True)
            within = ordered.cumsum(0) <= alpha * ordered.sum()
            mask[row, position[within]] = False
        removed = 1 - mask.double().mean().item()
        if abs(removed - sparsity) < 0.001 or high - low < 1e-9:
            return mask
        low, high = (alpha, high) if removed < sparsity else (low, alpha)
        alpha = (low + high) / 2


def test_the_variant_follows_the_appendix(text: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense")
    report = prune(
        source, out=tmp_path / "out", variant=True, calibration=text, propagate="block", dtype="float32", **OPTIONS
    )
    dense, pruned = load(source, torch.float32), load(tmp_path / "out", torch.float32)
    layers = {name: dense.model.layers[0].get_submodule(name) for name in ORDER}
    for name, sums in square_sums(dense, layers, tokens_of(text)).items():
        weight = layers[name].weight.data
        expected = plain_variant(weight.abs() * sums.sqrt().float(), 0.5)
        found = pruned.model.layers[0].get_submodule(name).weight != 0
        assert (expected != found).double().mean() <= 0.001 + 1 / weight.numel(), name
        assert len(set(found.sum(dim=1).tolist())) > 1, "rows lose different counts"
    assert report.sparsity == 0.5


def test_magnitude_needs_no_calibration_and_says_what_is_unused(text: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense")
    report = prune(source, out=tmp_path / "out", method="magnitude", sparsity=0.29, calibration=text, **OPTIONS)
    dense, pruned = load(source, torch.float32).state_dict(), load(tmp_path / "out", torch.float32).state_dict()
    for row in report.layers:
        weight = dense[row["name"] + ".weight"]
        mask = drop_lowest(weight.abs().reshape(1, -1), int(weight.numel() * 29 / 100)).reshape(weight.shape)
        assert torch.equal(torch.where(mask, weight, 0), pruned[row["name"] + ".weight"])
    (unused,) = [note for note in report.notes if note.startswith("not used")]
    assert all(flag in unused for flag in (f"--calibration {text}", f"--samples {SAMPLES}", f"--seqlen {SEQLEN}"))


def test_only_prunable_weights_differ_and_the_folder_is_an_ordinary_checkpoint(text: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense", dtype=torch.bfloat16, max_shard_size="40KB")
    prune(source, out=tmp_path / "out", calibration=text, command="wanda prune ...", **OPTIONS)
    before, after = Checkpoint.open(source).entries, Checkpoint.open(tmp_path / "out").entries
    assert before.keys() == after.keys()
    for key, entry in before.items():
        one, two = entry.read(), after[key].read()
        assert one.dtype == two.dtype
        if key.endswith("_proj.weight"):
            assert torch.equal(torch.where(two != 0, one, 0), two)
            assert int((two == 0).sum()) == two.numel() // 2
        else:
            assert torch.equal(one.view(torch.uint8), two.view(torch.uint8)), key
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "wanda.json"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert not (tmp_path / "out.partial").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arXiv:2306.11695" in card and "wanda prune ..." in card and "| 3 | 7 | 0.5000 |" in card


def test_a_recipe_repeats_its_run(text: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense")
    prune(source, out=tmp_path / "one", calibration=text, sparsity=0.3, sparsity_of={"*.o_proj": 0.7}, **OPTIONS)
    recipe = wanda.Recipe.from_file(tmp_path / "one" / "wanda.json")
    report = prune(source, out=tmp_path / "two", recipe=recipe, progress=False)
    one, two = (load(tmp_path / name, torch.float32).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    shares = {row["name"].rpartition(".")[2]: row["removed"] for row in report.layers}
    assert shares["o_proj"] == 32 * int(32 * 0.7) and shares["up_proj"] == 48 * int(32 * 0.3)


def test_a_dry_run_plans_without_loading_or_writing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanda.checkpoint.tensors import Entry

    def never(self: Entry) -> Tensor:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Entry, "read", never)
    source = tiny_llama(tmp_path / "dense")
    plan = prune(source, out=tmp_path / "out", calibration=text, pattern="2:4", dry_run=True, **OPTIONS)
    values = json.loads(json.dumps(plan.as_dict()))
    assert values["sparsity"] == 0.5 and len(values["layers"]) == 28 and values["estimated_memory_bytes"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_pruning_in_memory_equals_pruning_the_checkpoint(text: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense")
    prune(source, out=tmp_path / "out", calibration=text, dtype="float32", **OPTIONS)
    model = load(source, torch.float32)
    report = prune_model(model, tokens_of(text), batch=BATCH)
    expected = load(tmp_path / "out", torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert report.sparsity == 0.5
    with pytest.raises(ConfigurationError, match="needs calibration: pass token_ids"):
        prune_model(model)
    with pytest.raises(ConfigurationError, match="calibration, dtype would be ignored: the model is in memory"):
        prune_model(model, tokens_of(text), dtype="float32", calibration=text)
    with pytest.raises(ConfigurationError, match="sparsity would be ignored beside a recipe"):
        prune_model(model, tokens_of(text), recipe=Recipe(), sparsity=0.7)
    with pytest.raises(ConfigurationError, match="did you mean sparsity"):
        prune_model(model, sparsty=0.5)


@pytest.mark.parametrize("kind", DENSE + EXPERTS)
def test_every_architecture_is_pruned_exactly_saved_and_reloaded(kind: str, tmp_path: Path, text: str) -> None:
    source = saved(kind, tmp_path / "dense")
    tiny_tokenizer().save_pretrained(source)
    report = prune(
        source, out=tmp_path / "out", calibration=text, sparsity=0.6, dtype="float32", expert_tokens=1, **OPTIONS
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    parameters = dict(model.named_parameters())
    assert not {name for name in report.left_dense if ".experts." in name and name.endswith(("_proj", ".weight"))}
    for row in report.layers:
        out, width = row["shape"]
        assert row["removed"] == out * int(width * 3 / 5), row["name"]
        name = row["name"]
        if name + ".weight" in parameters:
            weight = parameters[name + ".weight"]
        else:
            fused, _, expert = name.rpartition(".")
            weight = parameters[fused][int(expert)]
        rows = [w for w in (weight, weight.T) if tuple(w.shape) == (out, width)]  # a square one may be either
        assert any(((w == 0).sum(dim=1) == int(width * 3 / 5)).all() for w in rows), name


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sparsity": ({"sparsity": 1.0}, ["sparsity 1"]),
    "contradictions": (
        {"pattern": "2:4", "group": "layer", "variant": True, "seqlen": 4096, "samples": 0},
        ["group layer", "variant", "context of 128", "--samples 0"],
    ),
    "pattern": ({"pattern": "5:4"}, ["5:4"]),
    "pattern and sparsity": ({"pattern": "2:4", "sparsity": 0.7}, ["0.7"]),
    "width": ({"pattern": "2:5"}, ["not a multiple of 5", "--exclude"]),
    "method": ({"method": "wnda"}, ["did you mean wanda"]),
    "calibration": ({"calibration": "nowhere.txt"}, ["nowhere.txt"]),
    "include": ({"include": ("*.nothing",)}, ["--include *.nothing matches no matrix", "self_attn.q_proj"]),
    "sparsity-of": ({"sparsity_of": {"*": 1.5}}, ["--sparsity-of *=1.5"]),
    "device": ({"device": "warp"}, ["warp"]),
    "memory": ({"memory": "1MB"}, ["--memory 1MB is too little", "the least is"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_at_once_and_nothing_is_written(case: str, text: str, tmp_path: Path) -> None:
    options, expected = BAD[case]
    source = tiny_llama(tmp_path / "dense")
    with pytest.raises(ConfigurationError) as caught:
        prune(source, out=tmp_path / "out", **({"calibration": text} | OPTIONS | options))
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_bad_outputs_are_refused(text: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense")
    with pytest.raises(ConfigurationError, match="is the input itself"):
        prune(source, out=source, calibration=text, **OPTIONS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match="not empty"):
        prune(source, out=tmp_path / "full", calibration=text, **OPTIONS)
    with pytest.raises(ConfigurationError, match="is a file"):
        prune(source, out=tmp_path / "full" / "file" / "out", calibration=text, **OPTIONS)
    assert (tmp_path / "full" / "file").read_text() == "mine"
    prune(source, out=tmp_path / "full", calibration=text, overwrite=True, **OPTIONS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense", "full"]
    assert not (tmp_path / "full" / "file").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_bad_numbers_stop_the_run_and_name_the_layer(bad: float, method: str, text: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_llama(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"model\.layers\.2\.mlp\.up_proj"):
        prune(source, out=tmp_path / "out", method=method, calibration=text, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_excluded_layers_stay_dense_and_are_reported(text: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense")
    report = prune(source, out=tmp_path / "out", exclude="*.down_proj", calibration=text, pattern="2:4", **OPTIONS)
    assert len(report.layers) == 24 and len(report.left_dense) == 4
    weight = load(tmp_path / "out", torch.float32).model.layers[1].mlp.down_proj.weight
    assert torch.equal(weight, load(source, torch.float32).model.layers[1].mlp.down_proj.weight)


def test_an_allocation_measures_through_blocks_that_stay_dense(
    tiny: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanda.allocation.owl import OWL

    measure, values = OWL.measure, []

    def noting(self: OWL, matrices: Any) -> float:
        values.append(measure(self, matrices))
        return values[-1]

    monkeypatch.setattr(OWL, "measure", noting)
    options = OPTIONS | {"method": "owl", "calibration": text}
    prune(tiny, out=tmp_path / "all", **options)
    every, values[:] = list(values), []
    prune(tiny, out=tmp_path / "some", exclude="model.layers.1.*", **options)
    assert values == every[:1] + every[2:]


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"method": "magnitude"}, 0),
        ({"method": "wanda"}, 1),
        ({"method": "wanda", "propagate": "none"}, 1),
        ({"method": "owl"}, 2),
        ({"method": "magnitude", "allocation": "owl"}, 1),
        ({"method": "wanda", "propagate": "block"}, 2),
    ],
)
def test_no_block_is_passed_more_often_than_needed(
    tiny: Path, text: str, tmp_path: Path, options: dict[str, Any], passes: int
) -> None:
    model = load(tiny, torch.float32)
    count = 0

    def counting(*_: Any) -> None:
        nonlocal count
        count += 1

    for block in model.model.layers:
        block.register_forward_pre_hook(counting)
    prune_model(model, tokens_of(text), batch=BATCH, **options)
    assert count == 4 * passes * SAMPLES // BATCH


@pytest.mark.parametrize(
    "options", [{"propagate": "block"}, {"propagate": "none"}, {"method": "owl", "propagate": "block"}]
)
def test_passes_that_gather_hold_the_inputs_of_one_micro_batch(
    tiny: Path, text: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    update, seen, most = Statistics.update, list[Any](), 0

    def noting(self: Statistics, x: Tensor, *others: Any) -> None:
        nonlocal most
        update(self, x, *others)
        seen.append(weakref.ref(x))
        most = max(most, sum(ref() is not None for ref in seen))

    monkeypatch.setattr(Statistics, "update", noting)
    prune_model(load(tiny, torch.float32), tokens_of(text).repeat(4, 1), batch=1, **options)
    assert len(seen) > 300 and most <= 4  # a block has four distinct inputs


def test_modules_keep_their_modes_and_what_is_not_used_in_memory_is_said(tiny: Path, text: str) -> None:
    model = load(tiny, torch.float32).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    report = prune_model(model, tokens_of(text), method="magnitude", batch=3, expert_tokens=5)
    assert [module.training for module in model.modules()] == modes
    assert report.notes == ["not used, since magnitude needs no calibration: batch, expert_tokens, token_ids"]
    assert prune_model(model, tokens_of(text), batch=3).notes == []


@pytest.mark.parametrize("pinned", [("model.layers.0.*",), ("model.layers.0.*", "model.layers.2.*"), ("*",)])
def test_an_allocation_beside_sparsities_of_ones_own_keeps_the_total_of_uniform(
    tiny: Path, pinned: tuple[str, ...]
) -> None:
    removed = {}
    for allocation in ("alpha", "uniform"):
        torch.manual_seed(0)
        model = load(tiny, torch.float32)
        for parameter in model.model.layers.parameters():
            parameter.data = torch.randn(parameter.shape)
        of = tuple(f"{glob}=0.5" for glob in pinned)
        report = prune_model(model, method="magnitude", allocation=allocation, sparsity=0.9, sparsity_of=of)
        removed[allocation] = sum(row["removed"] for row in report.layers)
        assert all(row["sparsity"] <= 1 for row in report.layers)
    assert removed["alpha"] == removed["uniform"]
