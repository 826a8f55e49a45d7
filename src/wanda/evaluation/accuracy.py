"""Accuracy of image classifiers: how often the right class is the first, or among the first five.

Standard errors are those of a share p of n images, sqrt(p (1 - p) / n).
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanda.chain import channels_of
from wanda.errors import ConfigurationError, RunError
from wanda.images import PREFIX, Images, open_images, pixel_values, readable


@dataclass(frozen=True)
class Accuracy:
    """What was measured, and on what.

    top1, top5: shares of the images, with their standard errors; top5 is None for a model of five classes or fewer.
    images: their number. seconds: of the forward passes; images_per_second: by them, the processor's work left out.
    """

    top1: float
    top1_error: float
    top5: float | None
    top5_error: float | None
    images: int
    images_per_second: float
    seconds: float
    dtype: str
    source: str
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self) | {"notes": list(self.notes) or None}


@torch.no_grad()
def measure(
    model: Any,
    processor: Any,
    source: str,
    *,
    limit: int | None = None,
    batch: int = 32,
    skip_unreadable: bool = False,
) -> Accuracy:
    """Accuracy of a classifier on SOURCE (see `wanda.images`; without its `images:`).

    limit: draw so many images at random, with seed 0. Raises ConfigurationError for images without a class, classes
    that are not the model's, an image that cannot be read; RunError when the model's answers are not finite.
    """
    source = source.removeprefix(PREFIX)
    images = open_images(source, "evaluation")
    targets = match_classes(images, model.config)
    order: Sequence[int] = range(len(images))
    if limit is not None and limit < len(images):
        order = sorted(random.Random(0).sample(order, limit))
    weight = next(model.parameters())
    notes: list[str] = []
    seconds, hits = 0.0, []
    pictures: list[Any] = []
    wanted: list[int] = []

    def run() -> None:
        nonlocal seconds
        pixels = pixel_values(processor, pictures).to(weight.device, weight.dtype)
        start = time.perf_counter()
        logits = model(pixel_values=pixels).logits.float().cpu()
        seconds += time.perf_counter() - start
        if not bool(torch.isfinite(logits).all()):
            raise RunError(
                "the model's answers are not finite: its weights or activations overflow; try --dtype float32"
            )
        hits.append(ranks(logits, torch.tensor(wanted)))
        pictures.clear()
        wanted.clear()

    for index, picture in readable(images, order, skip_unreadable, channels_of(model), notes):
        pictures.append(picture)
        wanted.append(targets[index])
        if len(pictures) == batch:
            run()
    if pictures:
        run()
    if not hits:
        raise ConfigurationError(f"{source} has no image that can be read")
    places = torch.cat(hits)
    count, few = len(places), model.config.num_labels <= 5
    top1, top5 = (float((places < k).double().mean()) for k in (1, 5))
    return Accuracy(
        top1=top1,
        top1_error=_error(top1, count),
        top5=None if few else top5,
        top5_error=None if few else _error(top5, count),
        images=count,
        images_per_second=count / seconds,
        seconds=seconds,
        dtype=str(weight.dtype).removeprefix("torch."),
        source=_name(source),
        notes=tuple(notes),
    )


def match_classes(images: Images, config: Any) -> list[int]:
    """The model's number for the class of every image: by the names of the classes, else by their sorted order.

    Raises ConfigurationError when an image has no class, or neither fits the model.
    """
    without = next((name for name, label in zip(images.names, images.labels, strict=True) if label is None), None)
    if without is not None:
        raise ConfigurationError(f"the image {without} is of no class; {images.cure}")
    known = {str(name): int(number) for name, number in (getattr(config, "label2id", None) or {}).items()}
    numbers: list[int]
    if images.classes and all(name in known for name in images.classes):
        numbers = [known[name] for name in images.classes]
    elif len(images.classes) == config.num_labels:
        numbers = list(range(config.num_labels))  # ImageNet's folders, say: sorted, they are in the model's order
    else:
        strange = next(name for name in images.classes if name not in known)
        raise ConfigurationError(
            f"{images.label} has {len(images.classes)} classes ({strange} among them), the model {config.num_labels} "
            "of other names: name the folders as config.json's label2id does, or give one for each of its classes"
        )
    return [numbers[label] for label in images.labels if label is not None]


def ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """How many classes come before the right one: int64 [images]; equals count as before it, so that ties do not help.

    logits: [images, classes]; targets: [images].
    """
    own = logits.gather(1, targets[:, None])
    return (logits >= own).sum(dim=1) - 1


def _error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)


def _name(source: str) -> str:
    """A source without the folder that it is in."""
    return source if source.startswith("hf:") else Path(source).name
