"""A grid of ways to prune, each pruned and measured: the cells of a comparison.

Every cell is pruned by a process of its own, so that its peak memory is its own, into DIR/models, and measured here.
DIR/results.json is replaced whole after every cell, the losses of the windows measured so far every few seconds: a
comparison that was stopped goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda.errors import ConfigurationError, RunError, near
from wanda.evaluation.grid import Grid, Setting, extent, label, options_of
from wanda.memory import give_back
from wanda.recipe import Recipe
from wanda.report.comparison import MEASURED, RESULTS, Board, Comparison, write_tables
from wanda.report.plots import write_plots

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wanda.plan import Plan

FORMAT = 1
_CALIBRATION = (
    "calibration",
    "samples",
    "seqlen",
    "seed",
    "propagate",
)  # what a recipe without calibration does not use
_NOTES = 4  # kinds of notes on layers that a cell keeps
_MODELS = "models"  # in OUT: the pruned models, while they are measured
_OFTEN = 5.0  # seconds of measuring that a stop may lose


@dataclass(frozen=True)
class Cell:
    """A point of the grid.

    recipe: as asked. resolved: plain values, None where they change nothing. key: digest of everything that the result
    depends on. name: unique within the comparison.
    """

    name: str
    key: str
    recipe: Recipe | None
    resolved: dict[str, Any] | None

    @property
    def folder(self) -> str:
        """Name of the folder that its model is written to."""
        words = "".join(c if c.isalnum() else "-" for c in self.name)
        return f"{'-'.join(filter(None, words.split('-')))}-{self.key[:12]}"

    def row(self, **results: Any) -> dict[str, Any]:
        """Its row in results.json."""
        asked = None if self.recipe is None else label(self.recipe)
        empty = dict.fromkeys(MEASURED) | {"error": None, "notes": []} if results else {}
        return {"name": self.name, "key": self.key, "label": asked, "recipe": self.resolved, **empty, **results}


def compare(
    model: str | Path,
    *,
    out: str | Path,
    grids: Sequence[Grid] | None = None,
    setting: Setting | None = None,
    title: str | None = None,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Prune a model in every way of a grid and measure the perplexity of each, and of the dense model.

    model: a Hugging Face folder, a hub id or a .gguf file. out: the folder of the results: results.json, .csv, .md and,
        with matplotlib, plots; cells that it has already are not run again.
    grids, setting: what to compare, and what all cells share; or options: their fields, which are the command line's
        flags (methods=["wanda", "sparsegpt"], sparsity=[0.5, 0.6], pattern="2:4", text=..., ...), as one grid.
    title: what the results call the model; its last part when None. progress: show a table that fills up, or log lines
        without a terminal.
    Seconds and peak bytes of memory are those of the pruning process. Raises ConfigurationError with the faults of all
    cells before anything is loaded; RunError at the end when cells failed (the others are kept).
    """
    grids, setting = _asked(grids, setting, options)
    out, name = Path(out), str(model).rstrip("/")
    plans = _plans(name, out, grids, setting)
    first = plans[0][1]
    ids, text = _text(first, setting)
    cells = _cells(plans, ids, setting)
    rows = _finished(out / RESULTS)
    missing = [cell for cell in cells if cell.recipe is not None and cell.key not in rows]
    _room(out, first.checkpoint.nbytes, len(missing), setting)
    with _locked(out):
        rows = _finished(out / RESULTS)
        result = Comparison(
            out=out,
            facts={
                "model": title or name.rpartition("/")[2],
                "text": text,
                "windows": len(ids),
                "seqlen": ids.shape[1],
                "dtype": _dtype(first),
                **_machine(),
            },
        )
        _run(name, cells, rows, result, first, ids, setting, progress)
    failed = [f"{row['name']}: {row['error']}" for row in result.rows if row["error"]]
    if failed:
        done = f"the other {len(result.rows) - len(failed)} cells are in {out}; the same command tries these again"
        raise RunError("\n".join([f"{len(failed)} of {len(result.rows)} cells failed; {done}", *failed]))
    return result


def _asked(
    grids: Sequence[Grid] | None, setting: Setting | None, options: Mapping[str, Any]
) -> tuple[Sequence[Grid], Setting]:
    known = {*Grid.__dataclass_fields__, *Setting.__dataclass_fields__}
    unknown = [f"there is no option {name!r}: {near(name, known)}" for name in options if name not in known]
    twice = [name for name in options if name in Grid.__dataclass_fields__ and grids is not None]
    twice += [name for name in options if name in Setting.__dataclass_fields__ and setting is not None]
    if twice:
        unknown.append(f"{' and '.join(twice)} would be ignored beside grids or a setting: say it there")
    if unknown:
        raise ConfigurationError(unknown)
    return grids or [options_of(Grid, options)], setting or options_of(Setting, options)


def _plans(model: str, out: Path, grids: Sequence[Grid], setting: Setting) -> list[tuple[Recipe, Plan]]:
    """Every recipe of the grids with its plan; raises ConfigurationError with the faults of all, told once each."""
    from wanda.calibration import check_source
    from wanda.checkpoint.source import classifies_images, load_config, resolve
    from wanda.plan import make_plan

    faults = [f"--text: {fault}" for fault in check_source(setting.text)]
    once: dict[Recipe, None] = {}
    for grid in grids:
        try:
            once.update(dict.fromkeys(grid.recipes(setting)))
        except ConfigurationError as error:
            faults += error.faults
    recipes = list(once)
    names = _names(recipes)
    if setting.windows is not None and setting.windows < 1:
        faults.append(f"--windows {setting.windows} has to be at least 1")
    if out.is_dir() and any(out.iterdir()) and not (out / RESULTS).exists():
        faults.append(f"--out {out} is not empty and holds no comparison to go on with; choose another folder")
    folder = None
    try:
        folder = resolve(model, setting.trust_remote_code)
        if out.resolve() == folder.resolve():
            faults.append(f"--out {out} is the input itself, which is never written to; choose another folder")
        if classifies_images(load_config(folder, setting.trust_remote_code)):
            raise ConfigurationError(
                f"{model} is an image classifier, and perplexity is compared here; take wanda prune and wanda eval "
                "--images"
            )
    except ConfigurationError as error:
        faults += error.faults
    found: dict[str, list[str]] = {}  # fault -> cells that have it
    plans = []
    for name, recipe in zip(names, recipes, strict=True):
        try:
            if folder is not None:
                # as the cells are pruned: OUT itself is added to, never replaced
                plans.append((recipe, make_plan(folder, out / _MODELS / "cell", recipe, overwrite=True)))
            elif recipe.faults():
                raise ConfigurationError(recipe.faults())
        except ConfigurationError as error:
            for fault in error.faults:
                found.setdefault(fault, []).append(name)
    for fault, having in found.items():
        if len(having) == len(recipes):
            faults.append(fault)
        else:
            more = f" and {len(having) - 4} more cells" if len(having) > 4 else ""
            faults.append(f"{'; '.join(having[:4])}{more}: {fault}")
    if setting.packed and plans:
        faults += _packable(plans[0][1], setting)
    if faults:
        raise ConfigurationError(faults)
    return plans


def _packable(plan: Plan, setting: Setting) -> list[str]:
    """Why pruned models could not be measured packed."""
    from wanda.runtime.loading import type_of

    faults = []
    if plan.skeleton.device.type != "cpu":
        faults.append(
            f"--packed: packed models run on the CPU, the comparison on {plan.skeleton.device}; choose --device cpu or "
            "leave it away"
        )
    try:
        type_of(_stored(plan), _dtype(plan), plan.checkpoint.folder)
    except ConfigurationError as error:
        faults += [f"--packed: {fault}" for fault in error.faults]
    return faults


def _stored(plan: Plan) -> set[torch.dtype]:
    """The types that a model's matrices are stored in."""
    return {entry.dtype for entry in plan.checkpoint.entries.values() if len(entry.shape) > 1}


def _names(recipes: Sequence[Recipe]) -> list[str]:
    """What each cell is called: samples and seed only where they tell cells apart."""
    told = [name for name in ("samples", "seed") if len({getattr(recipe, name) for recipe in recipes}) > 1]
    words = {"samples": "{} samples", "seed": "seed {}"}
    return [
        ", ".join([f"{label(r)} {extent(r)}", *(words[name].format(getattr(r, name)) for name in told)])
        for r in recipes
    ]


def _room(out: Path, nbytes: int, missing: int, setting: Setting) -> None:
    """Raise ConfigurationError unless the disk has room for a pruned model, or for all that are to be kept.

    nbytes: of a model; missing: models that are still to be pruned.
    """
    from wanda.checkpoint.folder import nearest_folder

    need = nbytes * ((missing if setting.keep else 1) + setting.packed) if missing else 0
    free = shutil.disk_usage(nearest_folder(out)).free
    if need > free:
        what = f"{missing} models" if setting.keep else "a model"
        raise ConfigurationError(
            f"--out {out}: {what} to be pruned: {_size(need)} are needed, "
            f"the disk has {_size(free)}; free some space or choose another"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _text(plan: Plan, setting: Setting) -> tuple[Tensor, str]:
    """The windows [windows, seqlen] that every model is measured on, tokenised once, and what they are of."""
    from wanda import sources
    from wanda.checkpoint.source import load_tokenizer
    from wanda.evaluation.perplexity import text_windows

    tokenizer = load_tokenizer(plan.checkpoint.folder, setting.trust_remote_code)
    ids, text = text_windows(setting.text, tokenizer, plan.seqlen, setting.windows)
    return ids, sources.name_of(setting.text) if text == setting.text else text


def _cells(plans: Sequence[tuple[Recipe, Plan]], ids: Tensor, setting: Setting) -> list[Cell]:
    """The dense model, then one cell for all recipes that come to the same thing."""
    from wanda import sources

    first = plans[0][1]
    common = {
        "input": first.checkpoint.fingerprint(),
        "text": hashlib.sha256(ids.numpy().tobytes() + str(ids.shape).encode()).hexdigest(),
        "dtype": _dtype(first),
        "device": str(first.skeleton.device),
        "versions": _versions(),
    }
    calibration = sources.identity(plans[0][0].calibration) if any(plan.calibrated for _, plan in plans) else None
    cells = {(key := _digest(common)): Cell("dense", key, None, None)}
    for name, (recipe, plan) in zip(_names([recipe for recipe, _ in plans]), plans, strict=True):
        # As asked: what is chosen for the sake of memory differs from hour to hour, and is in the notes.
        resolved = plan.asked.as_dict() | {
            "seqlen": plan.seqlen,
            "calibration": sources.name_of(recipe.calibration),
            "memory": None,
        }
        if not plan.calibrated:
            resolved |= dict.fromkeys(_CALIBRATION)
        if recipe.pattern is not None:
            resolved["group"] = None  # the M inputs compete
        content = {"calibration": calibration if plan.calibrated else None}  # whatever its file is called
        key = _digest(common | {"recipe": resolved | content} | ({"packed": True} if setting.packed else {}))
        if not plan.calibrated and key not in cells:
            name = f"{label(recipe)} {extent(recipe)}"
        cells.setdefault(key, Cell(name, key, recipe, resolved))
    return list(cells.values())


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _dtype(plan: Plan) -> str:
    return str(plan.skeleton.dtype).removeprefix("torch.")


def _versions() -> dict[str, str]:
    """Versions that a result depends on; the builtin text comes with Python."""
    from wanda.report import versions

    found = versions()
    python = ".".join(platform.python_version_tuple()[:2])
    return {name: found[name] for name in ("wanda-prune", "torch", "transformers")} | {"python": python}


def _machine() -> dict[str, Any]:
    import torch

    from wanda.report import versions

    return {"threads": torch.get_num_threads(), "versions": versions()}


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder against a second comparison."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise ConfigurationError(f"--out {out} cannot be made: {error.strerror}; choose another folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigurationError(f"another comparison is writing {out}; wait for it or choose another --out") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _finished(file: Path) -> dict[str, dict[str, Any]]:
    """The cells that results.json has, by key; those that failed are left out, to be tried again."""
    if not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            raise ValueError(f"format {kept['format']}")
        return {
            row["key"]: dict.fromkeys(MEASURED) | row for row in [*kept["cells"], *kept["earlier"]] if not row["error"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{file} holds no comparison ({error}); choose another --out or remove it") from error


def _run(
    model: str,
    cells: Sequence[Cell],
    rows: dict[str, dict[str, Any]],
    result: Comparison,
    plan: Plan,
    ids: Tensor,
    setting: Setting,
    progress: bool,
) -> None:
    """Run what is missing, the results on the disk replaced after each cell; draw the plots at the end."""
    models = result.out / _MODELS
    known = {cell.key for cell in cells}
    earlier = [row for key, row in rows.items() if key not in known]
    if earlier:
        result.notes.append(f"{len(earlier)} cells of earlier comparisons in this folder stay in {RESULTS}")
    for cell in cells:
        if cell.key in rows:
            rows[cell.key] |= cell.row()  # under their names of today
    result.rows = [rows[cell.key] for cell in cells if cell.key in rows]
    _write(result, earlier)
    if setting.keep and (reused := sum(cell.key in rows for cell in cells)):
        result.notes.append(f"--keep keeps the models of cells that are pruned now; {reused} were finished before")
    with (
        tempfile.TemporaryDirectory(prefix="wanda-compare.") as shared,
        Board([cell.name for cell in cells], progress) as board,
    ):
        for number, cell in enumerate(cells):
            if cell.key in rows:
                board.done(number, rows[cell.key], again=True)
        for number, cell in enumerate(cells):
            if cell.key in rows:
                continue
            try:
                row = _cell(model, cell, plan, ids, setting, models, Path(shared), partial(board.now, number))
            except (RunError, OSError) as error:  # of a disk that is full, say
                row = cell.row(error=str(error))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{result.out} keeps the finished cells: the same command goes on") from None
            rows[cell.key] = row
            board.done(number, row)
            result.rows = [rows[c.key] for c in cells if c.key in rows]
            _write(result, earlier)
    result.rows = [rows[cell.key] for cell in cells]
    if models.is_dir() and not any(models.iterdir()):
        models.rmdir()
    result.notes += write_plots(result)
    _write(result, earlier)


def _write(result: Comparison, earlier: Sequence[dict[str, Any]]) -> None:
    from wanda.checkpoint.folder import replace_file

    values = {"format": FORMAT, **result.facts, "cells": result.rows, "earlier": list(earlier), "notes": result.notes}
    try:
        replace_file(result.out / RESULTS, json.dumps(values, indent=1) + "\n")
        write_tables(result)
    except OSError as error:
        raise RunError(f"the results cannot be written to {result.out} ({error}); mend it and start again") from error


def _cell(
    model: str,
    cell: Cell,
    plan: Plan,
    ids: Tensor,
    setting: Setting,
    models: Path,
    shared: Path,
    now: Callable[[str], None],
) -> dict[str, Any]:
    """Prune and measure one cell: its row."""
    losses = models / f"{cell.folder}.losses.json"
    if cell.recipe is None:
        return cell.row(sparsity=0.0, **_measure(plan.checkpoint.folder, ids, setting.dtype, setting, losses, now))
    from wanda.checkpoint.folder import partial_folder
    from wanda.sources import name_of

    folder = models / cell.folder
    if not (folder / "wanda.json").is_file():  # one that was stopped while it was measured leaves its model
        try:
            _prune(model, folder, cell.recipe, shared, now)
        finally:
            shutil.rmtree(partial_folder(folder), ignore_errors=True)
    report = json.loads((folder / "wanda.json").read_text(encoding="utf-8"))
    try:
        if setting.packed:
            measured = _measure_packed(folder, ids, _dtype(plan), setting, losses, now)
        else:
            measured = _measure(folder, ids, setting.dtype, setting, losses, now)
    finally:
        if not setting.keep and not isinstance(sys.exception(), KeyboardInterrupt):
            shutil.rmtree(folder)
    errors = [layer["relative_error"] for layer in report["layers"] if layer["relative_error"] is not None]
    totals = report["totals"]
    return cell.row(
        sparsity=totals["sparsity"],
        **measured,
        seconds=totals["seconds"],
        peak_memory_bytes=totals["peak_memory_bytes"],
        relative_error=sum(errors) / len(errors) if errors else None,
        notes=[note.replace(cell.recipe.calibration, name_of(cell.recipe.calibration)) for note in _notes(report)],
    )


def _prune(model: str, folder: Path, recipe: Recipe, shared: Path, now: Callable[[str], None]) -> None:
    """Prune in a process of its own, whose log lines are told to `now`; raises RunError with its message.

    shared: a folder for what the cells have in common.
    """
    now("pruning")
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = shared / "recipe.json"
    file.write_text(json.dumps({"recipe": recipe.as_dict()}), encoding="utf-8")
    arguments = ["prune", model, "--out", str(folder), "--recipe", str(file), "--overwrite", "--shared", str(shared)]
    last: deque[str] = deque(maxlen=40)
    command = [sys.executable, "-m", "wanda", *arguments]
    held, pipe, nowhere = subprocess.PIPE, subprocess.PIPE, subprocess.DEVNULL  # it ends when its standard input does
    with subprocess.Popen(command, text=True, stdin=held, stdout=nowhere, stderr=pipe) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                last.append(line.rstrip("\n"))
                now(f"pruning: {last[-1]}")
        except BaseException:
            process.kill()
            raise
    if process.returncode < 0:
        raise RunError(f"pruning was killed by signal {-process.returncode}; 9 is often the system short of memory")
    if process.returncode:
        said = [line for line in last if line.startswith("wanda: ")] or list(last)[-1:]
        raise RunError(f"pruning ended with exit code {process.returncode}: {' '.join(said).removeprefix('wanda: ')}")


def _measure_packed(
    folder: Path, ids: Tensor, dtype: str, setting: Setting, losses: Path, now: Callable[[str], None]
) -> dict[str, Any]:
    """What `_measure` finds when the model in `folder` runs packed, and its packed size."""
    from wanda.checkpoint.packed import pack

    packed = folder.with_name(folder.name + ".packed")
    now("packing")
    try:
        summary = pack(str(folder), packed, overwrite=True)
        # A model of which nothing could be packed is an ordinary one.
        found = _measure(packed if summary.packed else folder, ids, dtype, setting, losses, now)
    finally:
        shutil.rmtree(packed, ignore_errors=True)
    return found | {"packed_size": summary.folder_after / summary.folder_before}


def _measure(
    folder: Path, ids: Tensor, dtype: str, setting: Setting, losses: Path, now: Callable[[str], None]
) -> dict[str, Any]:
    """Perplexity of the model in `folder`, and how long that took.

    losses: the file that keeps what is measured until all is.
    """
    import torch

    from wanda.checkpoint.folder import replace_file
    from wanda.evaluation.models import load
    from wanda.evaluation.perplexity import passes, perplexity_of

    kept = _measured(losses)
    done: list[float] = kept["losses"]
    now(f"measuring: window {len(done)}/{len(ids)}" if done else "measuring")
    network = load(folder, dtype, setting.device, setting.trust_remote_code)
    written = time.perf_counter()
    start = written - kept["seconds"]
    for found, _ in passes(network, ids[len(done) :]):
        done += found.tolist()
        if time.perf_counter() - written >= _OFTEN:
            losses.parent.mkdir(exist_ok=True)
            replace_file(losses, json.dumps({"losses": done, "seconds": time.perf_counter() - start}))
            written = time.perf_counter()
        now(f"measuring: window {len(done)}/{len(ids)}")
    seconds = time.perf_counter() - start
    losses.unlink(missing_ok=True)
    del network
    gc.collect()  # modules hold cycles,
    give_back()  # and the next process needs the room
    return {
        "perplexity": perplexity_of(torch.tensor(done, dtype=torch.float64)),
        "measure_seconds": round(seconds, 2),
    }


def _measured(losses: Path) -> dict[str, Any]:
    """The windows' losses that a stopped comparison has kept of a cell, and the seconds they took."""
    try:
        kept = json.loads(losses.read_text(encoding="utf-8"))
        return {"losses": [float(value) for value in kept["losses"]], "seconds": float(kept["seconds"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"losses": [], "seconds": 0.0}


def _notes(report: Mapping[str, Any]) -> list[str]:
    """Notes of the run, then those on its layers with how many have them."""
    kinds = Counter(note for layer in report["layers"] for note in layer["notes"])
    notes = [f"{count} matrices: {note}" for note, count in kinds.most_common(_NOTES)]
    more = [f"and {len(kinds) - _NOTES} more kinds of notes on matrices"] if len(kinds) > _NOTES else []
    return [*report["notes"], *notes, *more]
