"""Masks: read from the zeros, checked against the recipe, and held through any optimizer's step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from wanda.checkpoint.source import load_model
from wanda.errors import ConfigurationError
from wanda.recovery.masks import as_stored, hold_zeros, read_masks

NAME = "model.layers.1.mlp.up_proj"


def rewritten(folder: Path, change) -> Path:
    """The folder with `change(tensors)` applied to its weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def masks_of(folder: Path):
    return read_masks(load_model(folder, "float32", "cpu"), folder)


def test_masks_are_the_zeros_of_the_listed_matrices(pruned):
    folder = pruned()
    stored = load_file(folder / "model.safetensors")
    masks = masks_of(folder)
    assert len(masks.matrices) == len(masks.parameters) == 4 * 7
    assert masks.notes == []
    assert all(torch.equal(mask, stored[name] != 0) for name, mask in masks.parameters.items())
    assert masks.zeros * 2 == masks.weights == sum(mask.numel() for mask in masks.parameters.values())


def test_without_a_recipe_clearly_sparse_matrices_count_and_this_is_said(pruned):
    folder = pruned(recipe=False)
    rewritten(folder, lambda tensors: tensors[f"{NAME}.weight"].fill_(1))
    masks = masks_of(folder)
    assert len(masks.matrices) == 4 * 7 - 1 and NAME not in {matrix.name for matrix in masks.matrices}
    assert "no wanda.json" in masks.notes[0] and "27 of 28" in masks.notes[0]


def test_masks_that_do_not_match_the_recipe_are_refused_by_name(pruned, tiny):
    dense = load_file(tiny / "model.safetensors")[f"{NAME}.weight"]
    filled = rewritten(pruned("filled"), lambda tensors: tensors[f"{NAME}.weight"].copy_(dense))
    with pytest.raises(ConfigurationError, match=rf"filled do not match .*: {NAME} has 0 zeros, recorded as 768\."):
        masks_of(filled)
    emptied = rewritten(pruned("emptied"), lambda tensors: tensors[f"{NAME}.weight"].zero_())
    with pytest.raises(ConfigurationError, match=f"{NAME} has 1536 zeros, recorded as 768"):
        masks_of(emptied)
    # As many zeros, but not two of every four.
    shifted = rewritten(
        pruned("shifted"), lambda tensors: tensors[f"{NAME}.weight"].fill_(1).view(-1, 8)[:, :4].zero_()
    )
    with pytest.raises(ConfigurationError, match=rf"{NAME} has a group of 4 with more than 2 survivors"):
        masks_of(shifted)
    renamed = pruned("renamed")
    recipe = json.loads((renamed / "wanda.json").read_text())
    recipe["layers"][0]["name"] = "model.layers.9.nothing"
    (renamed / "wanda.json").write_text(json.dumps(recipe))
    with pytest.raises(ConfigurationError, match=r"model.layers.9.nothing is not a matrix of the model"):
        masks_of(renamed)


def test_a_dense_model_and_a_broken_report_are_refused(tiny, tmp_path, pruned):
    with pytest.raises(ConfigurationError, match="is not pruned: none of its 28 matrices is sparse"):
        masks_of(tiny)
    broken = shutil.copytree(pruned(), tmp_path / "broken")
    (broken / "wanda.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"wanda.json cannot be read"):
        masks_of(broken)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["sgd", "adamw", "rmsprop", "adagrad"],
)
def test_zeros_survive_momentum_decay_clipping_and_a_foreign_state(make):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 6)
    mask = torch.rand(6, 8) > 0.5
    with torch.no_grad():
        layer.weight.mul_(mask)
    start = layer.weight.detach().clone()
    optimizer = make(layer.parameters())
    hold_zeros(layer.named_parameters(), {"weight": mask}, optimizer)
    for step in range(5):
        optimizer.zero_grad()
        layer(torch.randn(4, 8)).square().sum().backward()
        assert bool((layer.weight.grad[~mask] == 0).all()) and bool((layer.weight.grad[mask] != 0).any())
        # Clipping sees the masked gradient only.
        norm = torch.nn.utils.clip_grad_norm_([layer.weight], 1e9)
        assert norm == pytest.approx(float(layer.weight.grad[mask].norm()), rel=1e-6)
        optimizer.step()
        assert bool((layer.weight[~mask] == 0).all())
        for value in optimizer.state[layer.weight].values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                assert bool((value[~mask] == 0).all())
                if step == 2:  # a state from elsewhere, with momentum on removed weights
                    value.add_(1)
    assert bool((layer.weight != start)[mask].all())


@given(
    st.lists(st.floats(-2.0, 2.0, width=32), min_size=4, max_size=40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**32 - 1),
)
def test_storing_keeps_the_zeros_to_the_weight(values, dtype, seed):
    weight = torch.tensor(values, dtype=torch.float32)
    mask = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) > 0.5
    stored = as_stored(weight, mask, dtype)
    assert stored.dtype == dtype
    assert torch.equal(stored != 0, mask)
    plain = weight.to(dtype)
    rounded_away = (plain == 0) & mask
    assert torch.equal(stored[mask & ~rounded_away], plain[mask & ~rounded_away])
    assert bool((stored[rounded_away].abs() == torch.finfo(dtype).smallest_normal).all())
    assert torch.equal(as_stored(weight, None, dtype), plain)


def test_zeros_hold_on_sharded_parameters(tmp_path):
    """FSDP2 replaces parameters by DTensors: the masks are sharded with them."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 6)
        mask = torch.rand(6, 8) > 0.5
        with torch.no_grad():
            layer.weight.mul_(mask)
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
        hold_zeros(layer.named_parameters(), {"weight": mask}, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(4, 8)).square().sum().backward()
            gradient = layer.weight.grad.full_tensor()
            assert bool((gradient[~mask] == 0).all()) and bool((gradient[mask] != 0).all())
            optimizer.step()
            assert torch.equal(layer.weight.full_tensor() != 0, mask)
    finally:
        dist.destroy_process_group()
