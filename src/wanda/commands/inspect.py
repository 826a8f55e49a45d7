"""`wanda inspect`: what a checkpoint's zeros look like, read from its files."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter


def inspect_command(
    model: str,
    *,
    pattern: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    trust_remote_code: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show the sparsity of every layer, N:M patterns, dead rows and columns, and sizes.

    Parameters
    ----------
    model
        A Hugging Face folder, a hub id, or a .gguf file.
    pattern
        Check that every group obeys this N:M, such as 2:4; without it 2:4, 4:8 and 1:4 are tried.
    json
        Print one JSON object instead of the table.
    trust_remote_code
        Run modelling code that comes with the model.
    """
    import json as json_module

    from wanda.checkpoint.source import resolve
    from wanda.inspection import inspect
    from wanda.patterns import NM
    from wanda.report.tables import print_inspection

    patterns = [NM.parse(pattern)] if pattern is not None else None
    result = inspect(resolve(model, trust_remote_code), patterns, trust_remote_code)
    if json:
        print(json_module.dumps(result.as_dict()))
    else:
        print_inspection(result)
