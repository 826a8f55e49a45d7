"""A model pruned by hand: half of its blocks' weights at zero, with the report that prune would write."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def is_pruned(key: str) -> bool:
    return ".layers." in key and key.endswith("proj.weight")


def magnitude_mask(weight: torch.Tensor, pattern: str) -> torch.Tensor:
    """True survives: the two largest of four, or the larger half of every row."""
    groups = weight.float().abs().reshape(-1, 4) if pattern == "2:4" else weight.float().abs()
    ranks = groups.argsort(dim=1).argsort(dim=1)
    return (ranks >= groups.shape[1] // 2).reshape(weight.shape)


def prune_by_hand(dense: Path, folder: Path, pattern: str = "2:4", recipe: bool = True) -> Path:
    """A copy of a checkpoint with half the weights of its blocks at zero, and the wanda.json that prune would write."""
    folder.mkdir(parents=True)
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(dense / "model.safetensors")
    layers = []
    for key, weight in tensors.items():
        if is_pruned(key):
            mask = magnitude_mask(weight, pattern)
            tensors[key] = weight * mask
            removed = int((~mask).sum())
            layers.append(
                {
                    "name": key.removesuffix(".weight"),
                    "shape": list(weight.shape),
                    "pattern": pattern,
                    "removed": removed,
                    "sparsity": removed / mask.numel(),
                }
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if recipe:
        (folder / "wanda.json").write_text(json.dumps({"format": 1, "layers": layers}), encoding="utf-8")
    (folder / "README.md").write_text("# pruned\n", encoding="utf-8")
    return folder
