"""Fused experts: masks held against routing by hand, and what becomes of experts that see few tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from architectures import tiny
from models import VOCABULARY
from wanda.pipeline import prune_model

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


def test_sending_every_token_to_every_expert_leaves_the_activations_alone() -> None:
    """--experts all gathers more but computes the same: with nothing to remove, the model's output stays."""
    model = tiny("mixtral")
    ids = tokens(2)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        prune_model(model, ids, sparsity=0.0, experts="all", propagate="layer")
        assert torch.equal(model(input_ids=ids).logits, before)


def test_the_router_stays_dense_and_is_reported() -> None:
    model = tiny("mixtral")
    gate = model.model.layers[0].mlp.gate.weight.clone()
    report = prune_model(model, tokens(2), expert_tokens=1)
    assert torch.equal(model.model.layers[0].mlp.gate.weight, gate)
    assert "router" in report.left_dense["model.layers.0.mlp.gate"]
