"""`merge`: an adapter into its pruned model, under the masks, so that the zeros stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wanda.checkpoint.folder import followed, new_folder, output_faults
from wanda.checkpoint.names import NameMap
from wanda.checkpoint.packed import is_packed
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.source import check_folder, load_model
from wanda.errors import ConfigurationError
from wanda.recovery.lora import load_adapter, merged_weights, require_peft
from wanda.recovery.masks import read_masks
from wanda.recovery.output import write_checkpoint


def merge(
    folder: str | Path,
    adapter: str | Path,
    *,
    out: str | Path,
    mask: bool = True,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge a LoRA adapter into a pruned checkpoint: W + M * (B A) s. Returns what `out`/wanda.json has under "merge".

    mask False merges without the masks: the adapted matrices are dense again, which record and model card say.
    An adapter trained with `sparse_aware` loses nothing by the masks. Raises ConfigurationError, writing nothing, when
    the masks do not match the recipe or the adapter does not fit.
    """
    folder, adapter, out = Path(folder), Path(adapter), followed(Path(out))
    _refuse(folder, adapter, out, overwrite)
    require_peft()
    source = Checkpoint.open(folder)
    model = load_model(folder, "float32", "cpu", trust_remote_code)
    masks = read_masks(model, folder)
    made_by = _tune_record(adapter)
    stored = {target for group in NameMap.of(model, source.entries).groups.values() for target in group.targets}
    tuned = load_adapter(model, adapter)
    merged = merged_weights(tuned, masks.parameters if mask else {})
    model = tuned.unload()
    strange = sorted(merged.keys() - stored)
    if strange:
        raise ConfigurationError(
            f"the adapter {adapter} changes {strange[0]}, for which {folder} has no tensor of its own (tied to "
            "another, say); merge it with the tool that made it"
        )
    zeros = masks.zeros
    if not mask:
        zeros = sum(
            int((merged.get(name, parameter) == 0).sum())
            for name, parameter in model.named_parameters()
            if name in masks.parameters
        )
    record = {
        "adapter": str(adapter),
        "masked": mask,
        "sparse_aware": bool(made_by.get("sparse_aware")),
        "merged_matrices": len(merged),
        "zeros": zeros,
        "pruned_matrices_weights": masks.weights,
        "notes": masks.notes,
    }
    sections: dict[str, Any] = {"merge": record} | ({"tune": made_by} if made_by else {})
    if not mask:
        sections["layers"] = _still_pruned(folder, merged)
    with new_folder(out, [folder, adapter], overwrite) as partial:
        write_checkpoint(partial, source, model, merged, masks.parameters if mask else {}, sections, card_text(record))
    return record


def card_text(record: dict[str, Any]) -> str:
    """The model card's paragraph about a merge."""
    share = record["zeros"] / record["pruned_matrices_weights"]
    how = "under the masks of the pruned weights" if record["masked"] else "without the masks (they are dense again)"
    return (
        f"The adapter `{record['adapter']}` was merged into {record['merged_matrices']} matrices {how}; "
        f"{share:.2%} of the pruned matrices' weights are zero."
    )


def _tune_record(adapter: Path) -> dict[str, Any]:
    """What `tune` noted beside the adapter; nothing for an adapter made by another tool."""
    file = adapter / "wanda.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("tune", {}) if file.is_file() else {}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error!r}); copy the adapter again") from error


def _still_pruned(folder: Path, merged: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of wanda.json whose matrices an unmasked merge left sparse."""
    file = folder / "wanda.json"
    rows = json.loads(file.read_text(encoding="utf-8")).get("layers", []) if file.is_file() else []
    return [row for row in rows if f"{row['name']}.weight" not in merged]


def _refuse(folder: Path, adapter: Path, out: Path, overwrite: bool) -> None:
    faults = []
    if not folder.is_dir():
        faults.append(f"there is no folder {folder}; merge takes the folder of a pruned checkpoint")
    elif is_packed(folder):
        faults.append(f"{folder} is packed; unpack it first: wanda unpack {folder} --out DIR")
    else:
        try:
            check_folder(folder)
        except ConfigurationError as error:
            faults += error.faults
    faults += output_faults(out, [folder, adapter], overwrite, resume=False)
    if faults:
        raise ConfigurationError(faults)
