"""`wanda bench`: a packed model and a dense one side by side, alternating in one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from wanda.errors import ConfigurationError

if TYPE_CHECKING:
    from wanda.runtime.measure import Fresh


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What is run, and how often."""

    tokens: int = 32
    """Tokens to decode in a round."""
    prompt: int = 16
    """Tokens of the prompt before decoding."""
    prefill: int = 512
    """Tokens of the prompt whose processing is timed."""
    rounds: int = 5
    """Rounds; every model has its turn in each."""
    threads: int | None = None
    """Threads; what torch takes when nothing is said."""
    prefer: Literal["speed", "memory"] = "speed"
    """speed: layers that decode no faster packed on this machine are loaded dense; memory: all stay packed."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What both compute in: the packed model's type, or float32, which auto takes on a CPU without bfloat16."""
    trust_remote_code: Annotated[bool, Parameter(negative="")] = False
    """Run modelling code that comes with the models."""
    json: Annotated[bool, Parameter(negative="")] = False
    """End with one JSON object on standard output instead of a table."""


def bench_command(packed: Path, *, against: str, options: Options | None = None) -> None:
    """Decoding and prefill of a packed model and of a dense one (torch, in the same type), memory and file sizes.

    Parameters
    ----------
    packed
        Folder that `wanda pack` wrote.
    against
        The dense model: a folder or a hub id.
    """
    options = options or Options()
    faults = [
        f"--{name} {getattr(options, name)} has to be at least 1"
        for name in ("tokens", "prompt", "prefill", "rounds", "threads")
        if getattr(options, name) is not None and getattr(options, name) < 1
    ]
    if faults:
        raise ConfigurationError(faults)
    from wanda.checkpoint.source import resolve

    dense = resolve(against, options.trust_remote_code)
    check_lengths((packed, dense), options)
    result = measure(packed, dense, options)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)


def check_lengths(folders: Iterable[Path], options: Options) -> None:
    """Raise ConfigurationError when a model's context is shorter than what is to be run."""
    from wanda.checkpoint.source import context_length, load_config

    faults = []
    for folder in folders:
        context = context_length(load_config(folder, options.trust_remote_code))
        wanted = {
            f"--prompt {options.prompt} and --tokens {options.tokens}": options.prompt + options.tokens,
            f"--prefill {options.prefill}": options.prefill,
        }
        for name, tokens in wanted.items():
            if context is not None and tokens > context:
                faults.append(f"{name} need {tokens} tokens, and the context of {folder} has {context}; ask for less")
    if faults:
        raise ConfigurationError(faults)


def measure(packed: Path, folder: Path, options: Options) -> dict[str, Any]:
    """All figures of a packed folder and of a dense one, in seconds and bytes, as plain JSON values."""
    import torch
    from transformers.utils import logging

    from wanda.checkpoint.source import load_model
    from wanda.runtime.loading import computed_dtype, load
    from wanda.runtime.measure import (
        Spread,
        alternate,
        decode_seconds,
        folder_bytes,
        fresh,
        prefill_seconds,
        ratios,
    )

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    trust = options.trust_remote_code
    dtype = str(computed_dtype(packed, options.dtype) or "auto").removeprefix("torch.")
    alone: dict[str, Fresh] = {
        "dense": fresh(folder, packed=False, trust_remote_code=trust, dtype=dtype),
        "packed": fresh(packed, packed=True, prefer=options.prefer, trust_remote_code=trust, dtype=dtype),
    }
    models: dict[str, Any] = {
        "dense": load_model(folder, dtype, "cpu", trust),
        "packed": load(packed, prefer=options.prefer, trust_remote_code=trust, dtype=dtype),
    }
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "dtype": dtype, "options": asdict(options)}
    for what, run in (
        ("decode", lambda model: decode_seconds(model, options.prompt, options.tokens)),
        ("prefill", lambda model: prefill_seconds(model, options.prefill)),
    ):
        print(f"{what}, {options.rounds} rounds", file=sys.stderr, flush=True)
        taken = alternate({name: partial(run, model) for name, model in models.items()}, options.rounds)
        result[what] = {
            **{name: asdict(Spread.of(seconds)) for name, seconds in taken.items()},
            "ratio": asdict(ratios(taken["dense"], taken["packed"])),
        }
    result["file_bytes"] = {"dense": folder_bytes(folder), "packed": folder_bytes(packed)}
    result["resident_bytes"] = {name: found.resident for name, found in alone.items()}
    result["load_seconds"] = {name: found.ready for name, found in alone.items()}
    return result


def show(result: dict[str, Any]) -> None:
    """The figures of `measure` as a table."""
    from rich.console import Console
    from rich.table import Table

    from wanda.runtime.measure import Spread

    title = f"{result['threads']} threads, {result['dtype']}, median (lowest-highest)"
    table = Table(title=title, title_justify="left")
    for name in ("", "dense", "packed", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    for what, label in (
        ("decode", "decode, ms a token"),
        ("prefill", f"prefill of {result['options']['prefill']}, ms"),
    ):
        values = result[what]
        cells = [Spread(*(1000 * n for n in values[name].values())).text(1) for name in ("dense", "packed")]
        table.add_row(label, *cells, Spread(**values["ratio"]).text() + " faster")
    for key, label, unit, scale in (
        ("file_bytes", "files", "MB", 1e6),
        ("resident_bytes", "resident memory", "MB", 1e6),
        ("load_seconds", "load, all bytes read", "s", 1.0),
    ):
        dense, packed = result[key]["dense"], result[key]["packed"]
        digits = 2 if unit == "s" else 1
        cells = [f"{n / scale:.{digits}f} {unit}" for n in (dense, packed)]
        table.add_row(label, *cells, f"{packed / dense:.3f} of dense")
    Console(markup=False).print(table)
