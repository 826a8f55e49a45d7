"""Tiny image classifiers of several families, and folders of images, built offline in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")
SIDE = 32
_TRANSFORMER: dict[str, Any] = {
    **{"image_size": SIDE, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "intermediate_size": 48},
}
_SWIN: dict[str, Any] = {
    **{"image_size": SIDE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2, 1], "num_heads": [2, 4, 4]},
    "window_size": 4,
}
_CONVNEXT: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 4,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 2, 1, 1],
}
# family: options of its config, and what the names of its prunable layers begin with
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "ViT": (_TRANSFORMER, "vit.layers."),
    "DeiT": (_TRANSFORMER, "deit.layers."),
    "ConvNext": (_CONVNEXT, "convnext.encoder.stages."),
    "Swin": (_SWIN, "swin.encoder.layers."),
}
# others that are walked, with how many blocks they have
WALKED: dict[str, tuple[dict[str, Any], int]] = {
    **{name: (options, {"ConvNext": 7, "Swin": 7}.get(name, 3)) for name, (options, _) in FAMILIES.items()},
    "ConvNextV2": (_CONVNEXT, 7),
    "Swinv2": (_SWIN, 7),
    "Beit": (_TRANSFORMER, 3),
    "Dinov2": ({k: v for k, v in _TRANSFORMER.items() if k != "intermediate_size"}, 3),
    "Siglip": ({"vision_config": _TRANSFORMER, "text_config": {"hidden_size": 8, "vocab_size": 8}}, 3),
    "ResNet": ({"embedding_size": 8, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 2, 1, 2]}, 6),
    "Pvt": (
        {
            "image_size": SIDE,
            "hidden_sizes": [16, 32, 64, 64],
            "depths": [1, 1, 2, 1],
            "num_attention_heads": [1, 2, 4, 8],
        },
        1,
    ),
}


def classifier(family: str, seed: int = 0, **changes: Any) -> Any:
    """A classifier of the family in evaluation mode, with weights large enough that its layers differ clearly."""
    options = (FAMILIES.get(family) or WALKED[family])[0] | changes
    config_class = getattr(transformers, f"{family}Config")
    labels = {name: number for number, name in enumerate(CLASSES)}
    torch.manual_seed(seed)
    config = config_class(**options, label2id=labels, id2label={number: name for name, number in labels.items()})
    model = getattr(transformers, f"{family}ForImageClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(0.5)
    return model.eval()


def processor_file(folder: Path, side: int = SIDE) -> None:
    """A processor's file, without which a folder is not whole."""
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": side, "width": side},
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def saved_classifier(family: str, folder: Path, **changes: Any) -> Path:
    """A tiny classifier with its processor, saved into `folder`."""
    classifier(family, **changes).save_pretrained(folder)
    processor_file(folder)
    return folder


def image_folder(folder: Path, count: int = 18, side: int = 40, seed: int = 0) -> Path:
    """Images of noise around a colour, a folder a class."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        home = folder / CLASSES[number % len(CLASSES)]
        home.mkdir(parents=True, exist_ok=True)
        colour = draw.integers(40, 200, 3)
        pixels = (colour + draw.normal(0, 40, (side, side + 8, 3))).clip(0, 255).astype("uint8")
        Image.fromarray(pixels).save(home / f"{number:03d}.png")
    return folder


def square_sums(model: nn.Module, pixels: Tensor, prefix: str) -> dict[str, Tensor]:
    """Sums of squares of the inputs of all linear layers and 1x1 convolutions below `prefix`, by plain hooks."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        if name.startswith(prefix) and (isinstance(module, nn.Linear) or pointwise):

            def note(module: nn.Module, args: Any, name: str = name) -> None:
                x = args[0].double()
                if isinstance(module, nn.Conv2d):
                    x = x[:, :, :: module.stride[0], :: module.stride[1]].permute(0, 2, 3, 1)
                found[name] = found.get(name, 0) + x.reshape(-1, x.shape[-1]).square().sum(dim=0)

            handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(pixels)
    for handle in handles:
        handle.remove()
    return found


def wanda_mask(weight: Tensor, square_sum: Tensor, sparsity: float, group: str) -> Tensor:
    """True survives: |W| ||X_j||, the smallest go, of each row or of the whole matrix."""
    scores = weight.flatten(1).double().abs() * square_sum.sqrt()
    competing = scores if group == "row" else scores.reshape(1, -1)
    count = int(competing.shape[1] * sparsity + 1e-9)
    order = competing.argsort(dim=1, stable=True)
    mask = torch.ones_like(competing, dtype=torch.bool).scatter_(1, order[:, :count], False)
    return mask.reshape(weight.shape)
