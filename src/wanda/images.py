"""Images: where they come from, which class they are of, and what a model's own processor makes of them.

SOURCE is images: and one of
  FOLDER          image files, at any depth; the first folder below FOLDER names the class (torchvision's ImageFolder)
  FILE.parquet    a set of the `datasets` library, with a column of images
  hf:NAME         a set of the hub, hf:NAME:SPLIT with its split, or a folder that `datasets` wrote with save_to_disk
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanda.errors import ConfigurationError, MissingExtraError

PREFIX = "images:"
_HUB = "hf:"
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_PICTURES, _CLASSES = ("image", "img", "picture"), ("label", "labels", "class", "fine_label")  # columns, by name


@dataclass(frozen=True)
class Images:
    """The images of a source, opened when they are asked for.

    label: the source, for reports. names: what an image is called in messages. read: the encoded image of a number.
    labels: its class, None where there is none. classes: names of the classes, by number. cure: how an image without a
    class gets one, for messages.
    """

    label: str
    names: Sequence[str]
    read: Callable[[int], bytes]
    labels: Sequence[int | None]
    classes: tuple[str, ...]
    cure: str = "put each image into a folder named after its class"

    def __len__(self) -> int:
        return len(self.names)


def is_images(source: str) -> bool:
    """Whether a calibration source is one of images rather than of text."""
    return source.startswith(PREFIX)


def faults(source: str) -> list[str]:
    """What is wrong with SOURCE (without its `images:`) as far as can be told cheaply, one sentence each."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        return [str(MissingExtraError("reading images", "pillow", "vision"))]
    if source.startswith(_HUB):
        return (
            []
            if source.removeprefix(_HUB)
            else ["images:hf: names no set; write images:hf:OWNER/NAME or hf:NAME:SPLIT"]
        )
    path = Path(source).expanduser()
    if not path.exists():
        return [f"there is no folder of images {path}; check the path (a set of the hub is images:hf:OWNER/NAME)"]
    if path.is_file():
        return [] if path.suffix == ".parquet" else [f"{path} is a file; give the folder of images, or a .parquet file"]
    if next(_files(path), None) is None:
        kinds = ", ".join(sorted(suffix[1:] for suffix in _SUFFIXES))
        return [f"{path} holds no images ({kinds}), at no depth; give the folder that does"]
    return []


def open_images(source: str, role: str) -> Images:
    """The images of SOURCE (without its `images:`); role: `calibration` takes a set's train split, else its test split.

    Raises ConfigurationError when there are none, or the set cannot be had.
    """
    found = faults(source)
    if found:
        raise ConfigurationError(found)
    path = Path(source).expanduser()
    if source.startswith(_HUB):
        return _of_table(source, _from_hub(source.removeprefix(_HUB), role))
    if path.is_file():
        import datasets

        try:
            with _silent():
                table = datasets.Dataset.from_parquet(str(path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ConfigurationError(
                f"{path} cannot be read as a table of images ({str(error).strip().splitlines()[0]}); copy it again"
            ) from error
        return _of_table(source, table)
    files = sorted(_files(path))
    parents = [file.relative_to(path).parts[:-1] for file in files]
    classes = tuple(sorted({parts[0] for parts in parents if parts}))
    number = {name: index for index, name in enumerate(classes)}
    labels = [number[parts[0]] if parts else None for parts in parents]
    return Images(source, [str(file) for file in files], lambda index: files[index].read_bytes(), labels, classes)


def load_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """The image processor of a model's folder (timm's data config for a timm model).

    Raises ConfigurationError when it has none.
    """
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it would tell which of its two libraries it takes
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigurationError(
            f"{folder} has no image processor that can be loaded ({reason}); "
            "copy preprocessor_config.json from the original model"
        ) from error
    finally:
        logging.set_verbosity(before)


def pixel_values(processor: Any, images: Sequence[Any]) -> Tensor:
    """What the processor makes of PIL images: float32 [images, channels, height, width].

    Raises ConfigurationError when it does not make them equal in size.
    """
    try:
        made = processor(list(images), return_tensors="pt")["pixel_values"]
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"the model's image processor cannot make equal tensors of the images ({str(error).splitlines()[0]}); "
            "its preprocessor_config.json has to give one size"
        ) from error
    return made.to(torch.float32)


def calibration_images(
    source: str,
    processor: Any,
    *,
    samples: int,
    seed: int = 0,
    skip_unreadable: bool = False,
    channels: int = 3,
    notes: list[str] | None = None,
) -> Tensor:
    """Images of SOURCE drawn at random without repeats, through the processor: [samples, channels, height, width].

    The same seed draws the same images. With `skip_unreadable` the next one drawn takes the place of one that cannot be
    read, which is said in `notes`. Raises ConfigurationError for fewer images than samples, or one that is unreadable.
    """
    images = open_images(source, "calibration")
    if len(images) < samples:
        raise ConfigurationError(
            f"images:{source} has {len(images)} images, --samples {samples} asks for more; give --samples {len(images)}"
        )
    order = random.Random(seed).sample(range(len(images)), len(images))
    made: list[Tensor] = []
    for _, picture in readable(images, order, skip_unreadable, channels, notes):
        made.append(pixel_values(processor, [picture]))
        if made[-1].shape != made[0].shape:
            raise ConfigurationError(
                "the model's image processor gives images of different sizes; its preprocessor_config.json has to give "
                "one size"
            )
        if len(made) == samples:
            return torch.cat(made)
    raise ConfigurationError(
        f"images:{source} has {len(made)} images that can be read, --samples {samples} asks for more"
    )


def readable(
    images: Images, order: Sequence[int], skip: bool, channels: int = 3, notes: list[str] | None = None
) -> Iterator[tuple[int, Any]]:
    """Numbers and PIL images, RGB or grey, in the given order; ConfigurationError names one that cannot be read.

    skip: leave such images out, which is said in `notes`.
    """
    from PIL import Image, UnidentifiedImageError

    for index in order:
        try:
            with Image.open(io.BytesIO(images.read(index))) as opened:
                picture = opened.convert("L" if channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "no image" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
            if not skip:
                raise ConfigurationError(
                    f"the image {images.names[index]} cannot be read ({reason}); replace it, or leave out what "
                    "cannot be read with --skip-unreadable"
                ) from error
            if notes is not None:
                notes.append(f"the image {images.names[index]} cannot be read ({reason}) and is left out")
            continue
        yield index, picture


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())


def _from_hub(name: str, role: str) -> Any:
    import datasets

    folder = Path(name).expanduser()
    name, _, split = (name, "", "") if folder.is_dir() else name.partition(":")
    try:
        with _silent():
            loaded = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigurationError(
            f"the set {name} of images cannot be had ({str(error).strip().splitlines()[0]}); check its name and the "
            "network, fill the cache by loading it once elsewhere, or give a folder of images"
        ) from error
    if not isinstance(loaded, dict):
        return loaded
    wanted = [split] if split else ["train"] if role == "calibration" else ["test", "validation"]
    for choice in wanted:
        if choice in loaded:
            return loaded[choice]
    raise ConfigurationError(f"the set {name} has no split {' or '.join(wanted)}; it has {', '.join(loaded)}")


def _of_table(source: str, table: Any) -> Images:
    import datasets

    features = table.features
    pictures = [n for n, kind in features.items() if isinstance(kind, datasets.Image)] or [
        n for n in features if n.lower() in _PICTURES
    ]
    if not pictures or not len(table):
        raise ConfigurationError(f"{source} has no images; its columns are {', '.join(features)}")
    column = pictures[0]
    table = table.cast_column(column, datasets.Image(decode=False))
    kinds = [n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)] or [
        n for n in features if n.lower() in _CLASSES
    ]
    labels: list[int | None] = [None] * len(table)
    classes: tuple[str, ...] = ()
    cure = f"give the table a column {_CLASSES[0]} with the number or the name of the class in every row"
    if kinds:
        kind, values = features[kinds[0]], list(table[kinds[0]])
        cure = f"give every row of the column {kinds[0]} the number or the name of its class"
        names = sorted({value for value in values if isinstance(value, str)})
        number = {name: index for index, name in enumerate(names)}
        # Fractions and lists are no classes, which only evaluation minds.
        usable = all(value is None or isinstance(value, int | str) for value in values)
        if usable and names:
            classes, labels = tuple(names), [number.get(value) for value in values]
        elif usable:  # -1 is in sets whose labels are kept secret
            labels = [value if value is not None and value >= 0 else None for value in values]
            count = max((label for label in labels if label is not None), default=-1) + 1
            classes = tuple(kind.names if isinstance(kind, datasets.ClassLabel) else map(str, range(count)))

    def read(index: int) -> bytes:
        value = table[index][column]
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    return Images(source, [f"{source}, row {index}" for index in range(len(table))], read, labels, classes, cure)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the bars of `datasets` out of logs."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
