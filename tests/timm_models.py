"""timm models, run by test_classifiers.py in a process of its own: pruned, reloaded by timm, masks by plain hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

import wanda
from classifiers import CLASSES, image_folder, square_sums, wanda_mask
from wanda.checkpoint.source import load_classifier
from wanda.commands.eval import Options, evaluate
from wanda.images import calibration_images, load_processor

MODELS: dict[str, tuple[dict[str, Any], str, int]] = {  # options, prefix of the prunable layers, blocks
    "mixer_s32_224": ({"img_size": 64, "mlp_ratio": (0.25, 0.25)}, "blocks.", 8),
    "convnext_atto": ({"drop_path_rate": 0.0}, "stages.", 19),  # its linear layers are 1x1 convolutions
}


def saved_timm(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    options = MODELS[name][0]
    model = timm.create_model(name, num_classes=len(CLASSES), **options).eval()
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    if name.startswith("convnext"):
        for stage in model.stages:
            for block in stage.blocks:
                torch.nn.init.normal_(block.gamma)
    save_for_hf(model, folder, safe_serialization=True, model_args=options, model_config={"label_names": list(CLASSES)})
    return model


@pytest.mark.parametrize(
    ("name", "group"), [("mixer_s32_224", "row"), ("mixer_s32_224", "layer"), ("convnext_atto", "row")]
)
def test_masks_equal_plain_hooks_and_timm_loads_the_result(name: str, group: str, tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    dense, out = saved_timm(name, tmp_path / "model"), tmp_path / "pruned"
    report: Any = wanda.prune(
        tmp_path / "model",
        out=out,
        group=group,
        propagate="none",
        calibration=f"images:{images}",
        samples=6,
        dtype="float32",
        progress=False,
    )
    assert max(row["block"] for row in report.layers) == MODELS[name][2] - 1
    pruned = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    pixels = calibration_images(str(images), load_processor(tmp_path / "model"), samples=6)
    sums = square_sums(dense, pixels, MODELS[name][1])
    before, after = dense.state_dict(), pruned.state_dict()
    assert {row["name"] for row in report.layers} == {f"timm_model.{key}" for key in sums}
    for key, square_sum in sums.items():
        mask = wanda_mask(before[f"{key}.weight"], square_sum, 0.5, group)
        assert torch.equal(after[f"{key}.weight"], before[f"{key}.weight"] * mask), key
    changed = {f"{key}.weight" for key in sums}
    assert all(torch.equal(after[key], before[key]) for key in before if key not in changed)
    assert set(load_file(out / "model.safetensors")) == set(load_file(tmp_path / "model" / "model.safetensors"))
    found = evaluate([str(out)], Options(images=str(images), dtype="float32"))[0].accuracy
    assert found is not None and found.images == 18
    with torch.no_grad():
        assert torch.allclose(load_classifier(out, "float32", "cpu")(pixels).logits, pruned(pixels), atol=1e-5)
    assert "timm.create_model" in (out / "README.md").read_text(encoding="utf-8")
