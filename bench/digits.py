"""A small ViT and a small ConvNeXt, trained here on scikit-learn's digits, and pruned by magnitude and by Wanda.

    python bench/digits.py [--config FILE] [--folder DIR] [--out DIR]

The digits are written as PNG files, a folder a class; everything after the training goes through wanda.prune and what
`wanda eval --images` measures with. Groups: the whole layer and each output row; Wanda's statistics from the dense
model (`none`, as the paper's image code takes them) and propagated (`layer`). Writes digits.json, .md and .png.
Models stay in DIR (the cache's bench-digits) and are trained when they are not there; those of another config are
refused. Needs the extra `plots` and scikit-learn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, ConvNextConfig, ViTConfig

from facts import facts
from kept import kept, note
from wanda.checkpoint.source import cache_folder, load_classifier
from wanda.evaluation.accuracy import measure
from wanda.images import load_processor
from wanda.pipeline import prune

CONFIGS = {"vit": ViTConfig, "convnext": ConvNextConfig}
WAYS = (  # score, group, propagate; magnitude has no statistics to propagate
    ("magnitude", "layer", None),
    ("magnitude", "row", None),
    ("wanda", "layer", "none"),
    ("wanda", "row", "none"),
    ("wanda", "layer", "layer"),
    ("wanda", "row", "layer"),
)


def main() -> None:
    here = Path(__file__)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=here.with_suffix(".toml"))
    parser.add_argument("--folder", type=Path, default=cache_folder() / "bench-digits", help="of models and images")
    parser.add_argument("--out", type=Path, default=here.parent / "results")
    arguments = parser.parse_args()
    config = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    result: dict[str, Any] = {"config": config} | facts() | {"models": {}}
    images = write_images(arguments.folder / "images", config["test"])
    for name in CONFIGS:
        folders, seconds = [], []
        for seed in config["seeds"]:
            folder = arguments.folder / f"{name}-{seed}"
            start = time.perf_counter()
            made_from = {
                "shape": config[name],
                "train": config["train"] | {"epochs": config["train"]["epochs"][name]},
                "seed": seed,
                "test": config["test"],
            }
            if not kept(folder, made_from):
                note(folder, made_from)
                train(name, config, seed, images, folder)
            seconds.append(round(time.perf_counter() - start, 1))
            folders.append(folder)
        result["models"][name] = {"train_seconds": seconds, **compare(folders, config, images)}
        print(table(name, result["models"][name], config), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "digits.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "digits.md").write_text(page(result), encoding="utf-8")
    plot(result, arguments.out / "digits.png")


def write_images(folder: Path, test: int) -> Path:
    """The digits as PNG files in folder/train/CLASS and folder/test/CLASS; the split is drawn with seed 0."""
    if kept(folder, {"test": test}):
        return folder
    note(folder, {"test": test})
    partial = folder.with_name("images.partial")
    shutil.rmtree(partial, ignore_errors=True)
    digits = load_digits()
    order = random.Random(0).sample(range(len(digits.images)), len(digits.images))
    for place, index in enumerate(order):
        home = partial / ("test" if place < test else "train") / str(digits.target[index])
        home.mkdir(parents=True, exist_ok=True)
        grey = (digits.images[index] * 255 / 16).round().astype("uint8")
        Image.fromarray(grey).convert("RGB").save(home / f"{index:04d}.png")
    partial.rename(folder)
    return folder


def train(name: str, config: dict[str, Any], seed: int, images: Path, folder: Path) -> None:
    """A classifier of the config's shape, trained on images/train with shifts by a pixel, and its processor."""
    torch.manual_seed(seed)
    shape, settings = config[name], config["train"]
    classes = {str(digit): digit for digit in range(10)}
    model = AutoModelForImageClassification.from_config(
        CONFIGS[name](**shape, label2id=classes, id2label={n: c for c, n in classes.items()})
    )
    side = shape["image_size"]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    processor_config = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": side, "width": side},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (partial / "preprocessor_config.json").write_text(json.dumps(processor_config, indent=1) + "\n", encoding="utf-8")
    processor = AutoImageProcessor.from_pretrained(partial)
    files = sorted((images / "train").rglob("*.png"))
    pixels: Tensor = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    targets = torch.tensor([int(file.parent.name) for file in files])
    epochs = settings["epochs"][name]
    steps = epochs * -(-len(files) // settings["batch"])
    optimizer = torch.optim.AdamW(model.parameters(), settings["learning_rate"], weight_decay=settings["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["learning_rate"], total_steps=steps)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(files)).split(settings["batch"]):
            shift = torch.randint(-1, 2, (2,)) * torch.randint(0, 2, (1,))  # every second batch as it is
            batch = torch.roll(pixels[part], shift.tolist(), dims=(2, 3))
            loss = model(pixel_values=batch, labels=targets[part]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().save_pretrained(partial)
    partial.rename(folder)


def compare(folders: list[Path], config: dict[str, Any], images: Path) -> dict[str, Any]:
    """Accuracy on images/test of the dense models and of every way and sparsity: per seed, and the mean."""
    found: dict[str, Any] = {"dense": summary([accuracy(folder, config, images) for folder in folders])}
    found["pruned"] = []
    for (score, group, propagate), sparsity in itertools.product(WAYS, config["sparsities"]):
        accuracies = []
        for folder in folders:
            with tempfile.TemporaryDirectory() as place:
                out = Path(place) / "pruned"
                report: Any = prune(
                    folder,
                    out=out,
                    progress=False,
                    method=score,
                    group=group,
                    propagate=propagate,
                    sparsity=sparsity,
                    calibration=f"images:{images / 'train'}",
                    samples=config["samples"],
                    dtype=config["dtype"],
                )
                accuracies.append(accuracy(out, config, images))
        way = {"score": score, "group": group, "propagate": propagate, "sparsity": sparsity}
        found["pruned"].append(way | {"weights": report.weights, "removed": report.removed} | summary(accuracies))
    return found


def accuracy(folder: Path, config: dict[str, Any], images: Path) -> float:
    model = load_classifier(folder, config["dtype"], "cpu")
    return measure(model, load_processor(folder), str(images / "test"), batch=128).top1


def summary(accuracies: list[float]) -> dict[str, Any]:
    """Mean, its standard error over the trainings, and every training's figure."""
    spread = statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else 0.0
    return {
        "top1": round(statistics.mean(accuracies), 4),
        "standard_error": round(spread, 4),
        "each": [round(value, 4) for value in accuracies],
    }


def label(row: dict[str, Any]) -> str:
    way = "" if row["propagate"] is None else f", propagate {row['propagate']}"
    return f"{row['score']}, {row['group']}{way}"


def table(name: str, found: dict[str, Any], config: dict[str, Any]) -> str:
    """The accuracies of a model as a Markdown table: a row a way, a column a sparsity."""
    dense = found["dense"]
    lines = [
        f"{name}: dense {dense['top1']:.2%} ± {dense['standard_error']:.2%}",
        "",
        "| way | " + " | ".join(f"{s:.0%}" for s in config["sparsities"]) + " |",
        "|---|" + "---:|" * len(config["sparsities"]),
    ]
    rows: dict[str, list[str]] = {}
    for row in found["pruned"]:
        rows.setdefault(label(row), []).append(f"{row['top1']:.2%} ± {row['standard_error']:.2%}")
    lines += [f"| {way} | {' | '.join(cells)} |" for way, cells in rows.items()]
    return "\n".join(lines) + "\n"


def page(result: dict[str, Any]) -> str:
    config = result["config"]
    head = (
        f"# Digits\n\nTop-1 on {config['test']} of scikit-learn's digits that were neither trained on nor calibrated "
        f"with: mean of {len(config['seeds'])} trainings ± its standard error over them (one figure alone has one of "
        f"about 1% from the number of images). {config['samples']} calibration images, {config['dtype']}. Made by "
        "`python bench/digits.py`.\n\n"
    )
    return head + "\n".join(table(name, found, config) for name, found in result["models"].items())


def plot(result: dict[str, Any], file: Path) -> None:
    """Accuracy against sparsity, a panel a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(result["models"]))
    lines = {None: "-", "none": "--", "layer": "-"}
    colours = {
        ("magnitude", "layer"): "C7",
        ("magnitude", "row"): "C3",
        ("wanda", "layer"): "C0",
        ("wanda", "row"): "C2",
    }
    for axes, (name, found) in zip(panels, result["models"].items(), strict=True):
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in found["pruned"]:
            rows.setdefault(label(row), []).append(row)
        for way, points in rows.items():
            first = points[0]
            axes.errorbar(
                [row["sparsity"] for row in points],
                [row["top1"] for row in points],
                [row["standard_error"] for row in points],
                marker="o",
                markersize=3,
                capsize=2,
                linewidth=1.2,
                color=colours[first["score"], first["group"]],
                linestyle=lines[first["propagate"]],
                label=way,
            )
        axes.axhline(found["dense"]["top1"], color="black", linewidth=0.8, linestyle=":", label="dense")
        axes.set_title(name)
        axes.set_xlabel("share of weights removed")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 on the test digits")
    panels[0].legend(fontsize=7, loc="lower left")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
