"""Fused experts: masks held against routing by hand, and what becomes of experts that see few tokens."""

from __future__ import annotations

import copy
import hashlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import saved, tiny
from models import VOCABULARY, tiny_tokenizer
from wanda.allocation import ALLOCATIONS
from wanda.block_loop import BlockLoop
from wanda.blocks import Blocks
from wanda.errors import ConfigurationError, RunError
from wanda.pipeline import prune, prune_model
from wanda.plan import Plan, choose
from wanda.recipe import Recipe
from wanda.scores import SCORES
from wanda.statistics import Statistics
from wanda.updates import UPDATES
from wanda.walk import Walk

EXPERTS, CHOSEN = 4, 2


def tokens(samples: int = 6, seqlen: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, seqlen), generator=torch.Generator().manual_seed(2))


def inputs_of(model: Any, module: Any, ids: Tensor) -> Tensor:
    """What a module is given over all tokens: [tokens, width]."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for row in ids:
            model(input_ids=row[None], use_cache=False)
    handle.remove()
    return torch.cat(found)


def drop(weight: Tensor, x: Tensor) -> Tensor:
    """Half of every row goes, by |W| times the norm of x's columns."""
    scores = weight.abs() * x.double().square().sum(dim=0).sqrt().float()
    pruned = weight.clone()
    for row in range(len(pruned)):
        pruned[row, scores[row].argsort(stable=True)[: scores.shape[1] // 2]] = 0
    return pruned


def by_hand(model: Any, ids: Tensor, everyone: bool) -> None:
    """Block after block: Mixtral's router in four lines, then every expert's two matrices on its own tokens."""
    for layer in model.model.layers:
        attention = {n: layer.get_submodule(f"self_attn.{n}_proj") for n in "qkvo"}
        pruned = {n: drop(m.weight.data, inputs_of(model, m, ids)) for n, m in attention.items()}
        x = inputs_of(model, layer.mlp, ids)
        chosen = (x @ layer.mlp.gate.weight.T).softmax(dim=-1).topk(CHOSEN, dim=-1).indices  # [tokens, chosen]
        experts = layer.mlp.experts
        for expert in range(EXPERTS):
            mine = x if everyone else x[(chosen == expert).any(dim=1)]
            gate_up, down = experts.gate_up_proj.data[expert], experts.down_proj.data[expert]
            gate, up = (mine @ gate_up.T).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            down.copy_(drop(down, inner))
            gate_up.copy_(drop(gate_up, mine))
        for name, weight in pruned.items():
            attention[name].weight.data = weight


@pytest.mark.parametrize("experts", ["routed", "all"])
def test_masks_equal_routing_by_hand(experts: str) -> None:
    model, expected = tiny("mixtral"), tiny("mixtral")
    ids = tokens()
    report = prune_model(model, ids, propagate="block", experts=experts, expert_tokens=1, batch=1)
    by_hand(expected, ids, experts == "all")
    found = model.state_dict()
    for name, tensor in expected.state_dict().items():
        agree = ((tensor != 0) == (found[name] != 0)).double().mean()
        assert agree > 0.9995, (name, agree)  # sums of expert inputs in another order: near ties
    rows = {row["name"]: row for row in report.layers}
    counts = [rows[f"model.layers.0.mlp.experts.down_proj.{expert}"]["tokens"] for expert in range(EXPERTS)]
    assert sum(counts) == ids.numel() * (EXPERTS if experts == "all" else CHOSEN)


@pytest.mark.parametrize("propagate", ["block", "layer"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_every_expert_loses_its_share_both_ways(kind: str, propagate: str) -> None:
    model = tiny(kind)
    report = prune_model(model, tokens(), method="wanda", pattern="2:4", propagate=propagate, expert_tokens=1)
    named = [row for row in report.layers if row["name"].rpartition(".")[2].isdigit()]
    assert len(named) >= 4 * 2 * EXPERTS and all(row["sparsity"] == 0.5 for row in named)
    assert all(row["relative_error"] is not None for row in named if not row["notes"])


def test_one_pass_and_two_see_the_same_experts_inputs_in_the_first_layer() -> None:
    reports = [prune_model(tiny("mixtral"), tokens(), propagate=p, expert_tokens=1) for p in ("block", "layer")]
    first = "model.layers.0.self_attn.q_proj"
    rows = [next(row for row in report.layers if row["name"] == first) for report in reports]
    assert rows[0]["relative_error"] == pytest.approx(rows[1]["relative_error"], rel=1e-6)


def test_experts_without_tokens_fall_back_to_magnitude_per_row_and_are_named() -> None:
    model = tiny("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[2:] = layer.mlp.gate.weight[:2] * 1e-3  # weak experts
    before = model.model.layers[1].mlp.experts.down_proj.data.clone()
    report = prune_model(model, tokens(), propagate="layer", expert_tokens=10**6)
    notes = {row["name"]: row["notes"] for row in report.layers if row["notes"]}
    assert len(notes) == 4 * 2 * EXPERTS and all("magnitude per row" in note[0] for note in notes.values())
    ones = torch.ones(1, before.shape[2])
    for expert in range(EXPERTS):
        assert torch.equal(model.model.layers[1].mlp.experts.down_proj.data[expert], drop(before[expert], ones))


@pytest.mark.parametrize("method", ["wanda", "fast"])
def test_no_threshold_still_needs_one_token(method: str) -> None:
    model = tiny("mixtral", num_local_experts=16, num_hidden_layers=1)
    report = prune_model(model, tokens(1)[:, :3], method=method, expert_tokens=0)
    starved = [row for row in report.layers if row["tokens"] == 0]
    assert starved and all("saw 0 calibration tokens: pruned by magnitude per row" in row["notes"] for row in starved)
    assert all(row["removed"] * 2 == row["shape"][0] * row["shape"][1] for row in starved)


def test_sending_every_token_to_every_expert_leaves_the_activations_alone() -> None:
    """--experts all gathers more but computes the same: with nothing to remove, the model's output stays."""
    model = tiny("mixtral")
    ids = tokens(2)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        prune_model(model, ids, sparsity=0.0, experts="all", propagate="layer")
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_model_that_runs_its_experts_in_grouped_products_is_pruned_like_any_other() -> None:
    plain, grouped = tiny("mixtral", num_hidden_layers=2), tiny("mixtral", num_hidden_layers=2)
    grouped.set_experts_implementation("grouped_mm")  # what from_pretrained chooses
    for model in (plain, grouped):
        prune_model(model, tokens(2), expert_tokens=1)
    assert grouped.get_experts_implementation()[""] == "grouped_mm"
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), grouped.parameters(), strict=True))


@pytest.mark.parametrize("kind, name", [("mixtral", "mlp.gate"), ("phimoe", "mlp.router")])  # a parameter, a Linear
def test_the_router_stays_dense_unless_it_is_included_by_name(kind: str, name: str) -> None:
    router = f"model.layers.0.{name}"
    ids = tokens(2)
    for include in ((), ("*.mlp.*",), ("*",)):
        model = tiny(kind, num_hidden_layers=2)
        before = model.get_submodule(router).weight.clone()
        report = prune_model(model, ids, expert_tokens=1, include=include)
        assert torch.equal(model.get_submodule(router).weight, before)
        assert "router" in report.left_dense[router]
    model = tiny(kind, num_hidden_layers=2)
    report = prune_model(model, ids, include=(f"*.{name}",))
    assert {row["name"] for row in report.layers} == {f"model.layers.{index}.{name}" for index in range(2)}
    assert (model.get_submodule(router).weight == 0).sum(dim=1).tolist() == [16] * EXPERTS


class Apart(nn.Module):
    """Mixtral's experts with gate and up in tensors of their own, [in, out] as some keep them, or [out, in]."""

    def __init__(self, fused: Any, transposed: bool):
        super().__init__()
        gate, up = fused.gate_up_proj.data.chunk(2, dim=1)
        self.is_transposed = transposed
        for name, tensor in (("gate", gate), ("up", up), ("down", fused.down_proj.data)):
            self.register_parameter(name, nn.Parameter((tensor.mT if transposed else tensor).contiguous()))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, place = torch.where(top_k_index == expert)
            if len(token):
                x = hidden_states[token]
                inner = nn.functional.silu(self.product(x, self.gate[expert])) * self.product(x, self.up[expert])
                out.index_add_(0, token, self.product(inner, self.down[expert]) * top_k_weights[token, place, None])
        return out

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if self.is_transposed else nn.functional.linear(x, weight)


@pytest.mark.parametrize("options", [{"propagate": "block"}, {"method": "sparsegpt", "pattern": "2:4"}])
def test_gate_and_up_as_one_matrix_or_two_in_either_layout_give_the_same(options: dict[str, Any]) -> None:
    ids = tokens()
    fused = tiny("mixtral", num_hidden_layers=2)
    prune_model(fused, ids, expert_tokens=1, batch=1, **options)
    for transposed in (False, True):
        model: Any = tiny("mixtral", num_hidden_layers=2)
        for layer in model.model.layers:
            layer.mlp.experts = Apart(layer.mlp.experts, transposed)
        prune_model(model, ids, expert_tokens=1, batch=1, **options)
        for layer, expected in zip(model.model.layers, fused.model.layers, strict=True):
            found = {n: p.data.mT if transposed else p.data for n, p in layer.mlp.experts.named_parameters()}
            gate_up = torch.cat([found["gate"], found["up"]], dim=1)
            for ours, theirs in (
                (gate_up, expected.mlp.experts.gate_up_proj),
                (found["down"], expected.mlp.experts.down_proj),
            ):
                assert ((ours != 0) == (theirs != 0)).double().mean() > 0.999
                assert torch.allclose(ours, theirs.data, atol=1e-3) or "method" not in options


def test_experts_whose_layout_nothing_tells_are_refused_with_the_cure() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Module()
            self.mlp.experts = nn.Module()
            self.mlp.experts.maps = nn.Parameter(torch.zeros(4, 32, 32))
            self.mlp.router = nn.Linear(32, 4)
            self.mlp.shared = nn.Linear(32, 32)

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    blocks = Blocks(("layers.0", "layers.1"), model.layers)
    _, _, faults = choose(model, blocks, Recipe())
    assert len(faults) == 1 and "--exclude 'layers.*.mlp.experts.maps'" in faults[0]
    matrices, dense, faults = choose(model, blocks, Recipe(exclude=("layers.*.mlp.experts.maps",)))
    assert not faults and [m.name for m in matrices[0]] == ["layers.0.mlp.shared"]
    assert {"layers.0.mlp.experts.maps", "layers.1.mlp.router"} <= dense.keys()


CHOICES = [
    *({"score": name} for name in SCORES.names()),
    *({"update": name} for name in UPDATES.names()),
    *({"update": name, "pattern": "2:4", "propagate": "block"} for name in UPDATES.names()),
    *({"allocation": name} for name in ALLOCATIONS.names()),
    *({"group": group, "propagate": "block"} for group in ("layer", "column", "block:16")),
    {"variant": True},
    {"update": "swap+pcg", "experts": "all"},
    {"method": "best", "propagate": "block"},
    {"method": "best", "propagate": "layer"},
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda options: "-".join(map(str, options.values())))
def test_every_choice_works_on_experts(options: dict[str, Any]) -> None:
    model = tiny("mixtral", num_hidden_layers=2)
    report = prune_model(model, tokens(3), expert_tokens=1, **options)
    assert report.as_dict()["totals"]["sparsity"] == pytest.approx(0.5, abs=0.005 if "variant" in options else 1e-3)
    rows = {row["name"]: row for row in report.layers if ".experts." in row["name"]}
    assert len(rows) == 2 * 2 * EXPERTS
    for name, row in rows.items():
        parameter, _, expert = name.rpartition(".")
        zeros = int((model.get_parameter(parameter)[int(expert)] == 0).sum())
        assert zeros == row["removed"]
        if options.get("score") != "magnitude":  # which needs no calibration
            assert row["tokens"] > 0 and 0 < row["relative_error"] < 1
        if not {"allocation", "variant"} & options.keys():
            assert row["sparsity"] == 0.5


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "jetmoe"])
@pytest.mark.parametrize("propagate", ["block", "layer"])
def test_the_dense_stream_stays_dense_beside_experts(
    kind: str, propagate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the two streams route their tokens otherwise."""
    model = tiny(kind, num_hidden_layers=3)
    dense = copy.deepcopy(model)
    entering: list[list[Tensor]] = []
    for way in ("prune_by_layer", "prune_by_block"):
        prune_block = getattr(Walk, way)

        def watched(walk: Walk, solve: Any, prune_block: Any = prune_block) -> None:
            assert walk.dense is not None
            entering.append([x.clone() for x in walk.dense])
            prune_block(walk, solve)

        monkeypatch.setattr(Walk, way, watched)
    report = prune_model(model, tokens(3), method="best", propagate=propagate, batch=1, expert_tokens=1)
    for sample, ids in enumerate(tokens(3).split(1)):
        states = dense(ids, output_hidden_states=True).hidden_states
        for block, streams in enumerate(entering):
            torch.testing.assert_close(streams[sample], states[block])
    unpaired = {row["name"] for row in report.layers if any("no input that goes with" in note for note in row["notes"])}
    fused = {n for n, parameter in dense.named_parameters() if parameter.ndim == 3}
    assert unpaired == {row["name"] for row in report.layers if row["name"].rpartition(".")[0] in fused}


ONE = 2 * 4 * 48 * 48  # bytes of the Gram matrix of the larger experts' inputs, and of its factor


@pytest.mark.parametrize("propagate", ["block", "layer"])
@pytest.mark.parametrize("kind", ["mixtral", "llama4_text", "jetmoe"])
def test_few_gram_matrices_of_experts_at_once_change_no_entry(
    kind: str, propagate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts one by one (mixtral), all in one product (llama4), and two experts modules in a block (jetmoe)."""
    alive, most = weakref.WeakSet[Statistics](), 0
    create = Statistics.__init__

    def count(self: Statistics, *args: Any, **kwargs: Any) -> None:
        nonlocal most
        create(self, *args, **kwargs)
        if self.owner.rpartition(".")[2].isdigit():
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(Statistics, "__init__", count)
    found = []
    for available in (None, 4 * ONE):
        monkeypatch.setattr("wanda.pipeline.available_memory", lambda _, given=available: given)
        model, most = tiny(kind, num_hidden_layers=2), 0
        report = prune_model(model, tokens(3), method="sparsegpt", propagate=propagate, expert_tokens=1, batch=1)
        found.append((model.state_dict(), [row["name"] for row in report.layers], most))
    (free, names, many), (bounded, same_names, few) = found
    assert names == same_names
    assert all(torch.equal(free[key], bounded[key]) for key in free)
    assert few <= 2  # the one that is made and the last one, or two small ones in one group
    assert propagate == "layer" or many >= 2 * EXPERTS


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts' Gram matrices are what takes memory: 8.4 MB for the inputs of each down_proj."""
    folder = saved("mixtral", tmp_path_factory.mktemp("wide") / "m", num_hidden_layers=2, intermediate_size=1024)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_plan_bounds_the_gram_matrices_of_experts(
    wide: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanda.plan.resident_memory", lambda: 400 << 20)
    options: dict[str, Any] = {"calibration": text, "samples": 4, "seqlen": 24, "batch": 2, "dtype": "float32"}
    options |= {"method": "sparsegpt", "propagate": "block", "expert_tokens": 1, "progress": False}
    one = 2 * 4 * 1024**2
    free = prune(wide, out=tmp_path / "free", **options)
    plan = prune(wide, out=tmp_path / "plan", dry_run=True, **options)
    assert isinstance(plan, Plan) and plan.passes() == 1
    cap = plan.memory - 2 * one  # two fewer than all four
    bounded = prune(wide, out=tmp_path / "bounded", memory=str(cap), **options)
    assert any("up to 2 dense passes a block" in note for note in bounded.notes)
    assert not any("to stay below" in note for note in bounded.notes)
    assert digest(tmp_path / "free") == digest(tmp_path / "bounded")
    assert [row["name"] for row in free.layers] == [row["name"] for row in bounded.layers]
    layered = prune(wide, out=tmp_path / "plan", dry_run=True, **options | {"propagate": "layer"})
    assert any("given back before the next" in note for note in layered.notes)
    least = plan.memory - 4 * one + one // 2
    with pytest.raises(
        ConfigurationError, match=r"down_proj.0 \(1024 inputs\).*take 8.39 MB.*--method wanda.*--exclude"
    ):
        prune(wide, out=tmp_path / "plan", memory=str(least), **options | {"batch": 1})
    monkeypatch.setattr("wanda.plan.available_memory", lambda _: one - 1)
    with pytest.raises(ConfigurationError, match=r"the available memory .* is too little.*down_proj.0"):
        prune(wide, out=tmp_path / "plan", **options)
    assert not list(tmp_path.glob("plan*"))


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors*")}


@pytest.mark.parametrize("propagate", ["block", "layer"])
def test_a_run_on_experts_resumes_to_the_same_bytes(
    propagate: str, wide: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanda.plan.available_memory", lambda _: 1 << 40)
    monkeypatch.setattr("wanda.plan.EXPERTS_SHARE", (1 << 40) // (10 << 20))  # one large Gram matrix at once
    options: dict[str, Any] = {"calibration": text, "samples": 3, "seqlen": 24, "batch": 1, "dtype": "float32"}
    options |= {"method": "sparsegpt", "propagate": propagate, "expert_tokens": 1, "progress": False}
    prune(wide, out=tmp_path / "whole", **options)
    walk = BlockLoop._prune

    def stop(self: BlockLoop, index: int, *arguments: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        walk(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BlockLoop, "_prune", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(wide, out=tmp_path / "out", **options)
    prune(wide, out=tmp_path / "out", resume=True, **options)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("kind, each", [("llama4_text", 1), ("gpt_oss", 2), ("mixtral", 2)])
def test_only_tokens_that_were_sent_to_an_expert_count(kind: str, each: int) -> None:
    model = tiny(kind, num_hidden_layers=2, **({"num_experts_per_tok": 1} if kind == "llama4_text" else {}))
    ids = tokens(2)
    for experts in ("routed", "all"):
        if experts == "all" and kind == "llama4_text":
            with pytest.raises(ConfigurationError, match=r"--experts all: Llama4TextExperts.*use --experts routed"):
                prune_model(model, ids, experts=experts)
            continue
        report = prune_model(model, ids, sparsity=0.0, experts=experts)
        counts = {row["name"]: row["tokens"] for row in report.layers if row["name"].rpartition(".")[2].isdigit()}
        for matrix in ("gate_up_proj", "down_proj"):
            seen = [n for name, n in counts.items() if f".0.{model_part(kind)}.experts.{matrix}" in name]
            assert len(seen) == EXPERTS and sum(seen) == ids.numel() * (EXPERTS if experts == "all" else each)


def model_part(kind: str) -> str:
    return "feed_forward" if kind == "llama4_text" else "mlp"


def test_experts_that_no_product_shows_are_an_error_and_not_pruned_by_magnitude(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = tiny("mixtral", num_hidden_layers=2)
    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "forward", lambda self, x, *_: x)
    with pytest.raises(RunError, match=r"gate_up_proj.0 was not multiplied with anything.*--exclude"):
        prune_model(model, tokens(2))
