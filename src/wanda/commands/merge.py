"""`wanda merge`: a LoRA adapter into its pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def merge_command(
    folder: Path,
    adapter: Path,
    *,
    out: Path,
    mask: bool = True,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    trust_remote_code: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Merge a LoRA adapter into its pruned model, under the masks, so that the zeros stay.

    Parameters
    ----------
    folder
        The pruned checkpoint that the adapter was trained on.
    adapter
        Folder of the adapter: `wanda tune --lora` or peft wrote it.
    out
        Folder to write; it is whole or absent.
    mask
        --no-mask merges without the masks: the adapted matrices become dense again.
    overwrite
        Replace a non-empty --out.
    trust_remote_code
        Run modelling code that comes with the model.
    json
        End with one JSON object on standard output.
    """
    import json as json_module

    from wanda.recovery.merge import merge

    record = merge(folder, adapter, out=out, mask=mask, overwrite=overwrite, trust_remote_code=trust_remote_code)
    if json:
        print(json_module.dumps(record))
        return
    share = record["zeros"] / record["pruned_matrices_weights"]
    print(f"{out}: {record['merged_matrices']} matrices merged; {share:.2%} of the pruned matrices' weights are zero")
    if record["masked"] and not record["sparse_aware"]:
        print("the adapter was not trained through the masks, which costs part of what it learned: tune --sparse-aware")
    for note in record["notes"]:
        print(f"note: {note}")
