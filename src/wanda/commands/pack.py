"""`wanda pack`: a sparse checkpoint into one that is as small as it is sparse."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """How to write."""

    compress: bool = False
    """For shipping: zstd on exponents and masks (the extra `compress`). Loading then decompresses into memory."""
    overwrite: Annotated[bool, Parameter(negative="")] = False
    """Replace an --out that is not empty."""
    json: Annotated[bool, Parameter(negative="")] = False
    """End with one JSON object on standard output instead of sentences."""


def pack_command(model: str, *, out: Path, options: Options | None = None) -> None:
    """Pack the sparse matrices of a checkpoint: survivors, bit mask and row offsets; without any loss.

    Parameters
    ----------
    model
        Folder of a sparse checkpoint (or a hub id).
    out
        Folder to write.
    """
    from wanda.checkpoint.packed import pack
    from wanda.commands.unpack import progress

    options = options or Options()
    with progress("packing") as step:
        summary = pack(model, out, options.compress, options.overwrite, step)
    for name in summary.left_out:
        print(f"wanda: {name} was not taken over", file=sys.stderr)
    if options.json:
        print(json.dumps(asdict(summary)))
        return
    if summary.packed:
        ratio = summary.packed_bytes / summary.dense_bytes
        print(
            f"{summary.packed} matrices packed: {summary.dense_bytes / 1e6:.1f} MB -> "
            f"{summary.packed_bytes / 1e6:.1f} MB ({ratio:.3f} of dense)"
        )
    else:
        print("no matrix is sparse enough for packing to pay; everything stays dense")
    if summary.left_dense:
        names = ", ".join(summary.left_dense[:3]) + (", ..." if len(summary.left_dense) > 3 else "")
        print(f"dense in spite of some zeros, since packing does not pay ({len(summary.left_dense)}): {names}")
    print(
        f"all tensors: {summary.folder_before / 1e6:.1f} MB -> {summary.folder_after / 1e6:.1f} MB "
        f"({summary.folder_after / max(1, summary.folder_before):.3f}); written to {out}"
    )
