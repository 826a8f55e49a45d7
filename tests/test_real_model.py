"""The real model, with short sequences: masks, perplexity and the zeros of SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wanda
from wanda.checkpoint.reader import Checkpoint


@pytest.mark.parametrize("propagate", ["layer", "block"])
def test_wanda_prunes_the_real_model_far_better_than_magnitude(smollm2: Path, tmp_path: Path, propagate: str) -> None:
    options = {"calibration": "builtin", "samples": 4, "seqlen": 128, "propagate": propagate, "progress": False}
    measured = {}
    for method in ("magnitude", "wanda"):
        report = wanda.prune(smollm2, out=tmp_path / method, method=method, include="model.layers.[0-9].*", **options)
        assert report.sparsity == 0.5 and len(report.layers) == 70
        measured[method] = wanda.perplexity(tmp_path / method, "builtin", seqlen=128, windows=4).perplexity
    dense = wanda.perplexity(smollm2, "builtin", seqlen=128, windows=4).perplexity
    assert dense < measured["wanda"] < measured["magnitude"]
    before, after = Checkpoint.open(smollm2).entries, Checkpoint.open(tmp_path / "wanda").entries
    for name in ("model.layers.12.mlp.down_proj.weight", "model.norm.weight"):
        assert torch.equal(before[name].read(), after[name].read())
    one, two = (entries["model.layers.3.mlp.down_proj.weight"].read() for entries in (before, after))
    assert torch.equal(two, torch.where(two == 0, 0, one))
    removed = ((two == 0) & (one != 0)).sum(dim=1)  # the dense model has zeros of its own, which go first
    assert bool((removed + (one == 0).sum(dim=1) == two.shape[1] // 2).all())
