"""Writing a tuned checkpoint: the trained tensors in their stored type, everything else byte for byte as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wanda.checkpoint.folder import INDEX, WEIGHTS
from wanda.checkpoint.names import NameMap
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.tensors import Entry, write_file
from wanda.errors import RunError
from wanda.evaluation.record import without_evaluation
from wanda.recovery.masks import as_stored

_HEADING = "## Recovery"


def write_checkpoint(
    folder: Path,
    source: Checkpoint,
    model: nn.Module,
    changed: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    record: Mapping[str, Any],
    text: str,
) -> None:
    """Write the checkpoint `source` into the empty folder `folder` with some parameters changed.

    changed: new values by name in the model, any floating type, on the CPU; masks: the zeros that must hold in them.
    record: sections for wanda.json; text: a paragraph for the model card. Files, shards and the order of tensors stay.
    Raises RunError for a conversion that cannot be undone, OSError where the disk is full.
    """
    names = NameMap.of(model, source.entries)
    tensors: dict[str, Tensor] = {}
    for group in {id(group): group for group in names.groups.values()}.values():
        targets = [name for name in group.targets if name in changed]
        if not targets:
            continue
        if set(targets) != set(group.targets):
            raise RunError(
                f"{group.first} is stored together with parameters that were not trained; it cannot be written"
            )
        dtype = source.entries[group.sources[0][0]].dtype
        stored = {name: as_stored(changed[name], masks.get(name), dtype) for name in group.targets}
        tensors.update(names.unload(group, stored))
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Tensor | Entry]] = {}
    for key, entry in sorted(source.entries.items(), key=lambda item: item[1].offset):
        files.setdefault(entry.file.name, {})[key] = tensors.get(key, entry)
    for name, content in files.items():
        write_file(folder / name, content, {"format": "pt"})
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and (path.name == INDEX or not path.name.endswith(WEIGHTS)):
            shutil.copyfile(path, folder / path.name)
    add_record(folder, record, text)


def add_record(folder: Path, record: Mapping[str, Any], text: str) -> None:
    """Add sections to the folder's wanda.json, and a paragraph under "Recovery" to its model card."""
    file = folder / "wanda.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known.pop("evaluation", None)  # measured on other weights
    file.write_text(json.dumps({**known, **record}, indent=1) + "\n", encoding="utf-8")
    card = folder / "README.md"
    before = without_evaluation(card.read_text(encoding="utf-8")) if card.is_file() else ""
    heading = "" if _HEADING in before else f"{_HEADING}\n\n"
    card.write_text(f"{before.rstrip()}\n\n{heading}{text}\n".lstrip(), encoding="utf-8")


def learning_curve(file: Path, history: list[dict[str, float]], title: str) -> bool:
    """Draw training and held-out loss over the steps into a PNG file; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(row["step"], row[key]) for row in history if key in row]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], label=label, marker="o" if key == "eval_loss" else None
        )
    axes.set(xlabel="optimizer step", ylabel="cross entropy per token", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    return True
