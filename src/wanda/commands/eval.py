"""`wanda eval`: perplexity, distance from the dense model, tasks, and images, of one or more models side by side."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from wanda.errors import ConfigurationError, RunError, WandaError

if TYPE_CHECKING:
    from wanda.evaluation.accuracy import Accuracy
    from wanda.evaluation.perplexity import Perplexity
    from wanda.evaluation.tasks import Score


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how."""

    text: str | None = None
    """Text for perplexity: c4, wikitext2, ptb, builtin (the part that calibration never sees) or a file
    (FILE, FILE.jsonl:field, FILE.parquet:field+field); builtin when neither a text nor tasks are asked for."""
    seqlen: int | None = None
    """Tokens a window; min(2048, the smallest of the models' contexts) when nothing is said."""
    windows: int | None = None
    """Measure the first so many windows only."""
    against: str | None = None
    """A dense model: adds the mean KL divergence from its predictions, in nats a token."""
    tasks: Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=True)] = ()
    """Tasks of lm-evaluation-harness, separated by commas or blanks; paper: the paper's seven and their mean."""
    fewshot: int | None = None
    """Examples in front of every question; what the task says when nothing is said."""
    limit: int | None = None
    """Score the first so many records of every task only, or so many images, drawn at random with seed 0."""
    images: str | None = None
    """Top-1 and top-5 of image classifiers on FOLDER (a folder a class), FILE.parquet or hf:NAME[:SPLIT]."""
    skip_unreadable: Annotated[bool, Parameter(negative="")] = False
    """Leave images out that cannot be read, instead of stopping at the first."""
    data: Path | None = None
    """Folder of local copies of the tasks' data sets, for work without a network."""
    include_path: Path | None = None
    """Folder of task files of your own."""
    batch: int | None = None
    """Windows (task requests, images) in a forward pass; what memory allows (8, 32) when nothing is said."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type; auto is bfloat16 where the CPU or GPU has it, float32 elsewhere."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    stream: Annotated[bool, Parameter(negative="")] = False
    """Perplexity with one block in memory at a time, for models larger than memory."""
    trust_remote_code: bool = False
    """Run modelling code that comes with a model."""
    json: Annotated[bool, Parameter(negative="")] = False
    """End with one JSON object on standard output instead of tables."""


@dataclass
class Result:
    """What came out for one model, filled in as it is found.

    fault: what kept the rest of it from being measured. unkept: why it could not be kept in the folder's wanda.json.
    """

    model: str
    folder: Path
    perplexity: Perplexity | None = None
    scores: list[Score] = field(default_factory=list)
    mean: float | None = None
    accuracy: Accuracy | None = None
    fault: WandaError | None = None
    unkept: str | None = None

    @property
    def found(self) -> bool:
        """Whether anything was measured."""
        return self.perplexity is not None or self.accuracy is not None or bool(self.scores)

    def keep(self, kind: str, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Record results with the folder; a fault is noted, since what was measured is still to be shown."""
        from wanda.evaluation.record import record

        try:
            record(self.folder, kind, results)
        except RunError as error:
            self.unkept = str(error)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.model,
            "perplexity": None if self.perplexity is None else self.perplexity.as_dict(),
            "tasks": [vars(score) for score in self.scores],
            "mean_of_paper": self.mean,
            "images": None if self.accuracy is None else self.accuracy.as_dict(),
            "error": None if self.fault is None else str(self.fault),
        }


def eval_command(*models: str, options: Options | None = None) -> None:
    """Measure perplexity on a text, tasks, or accuracy on images, of one or more models.

    Results also go into a pruned folder's wanda.json and onto its model card.

    Parameters
    ----------
    models
        Folders (packed ones too), hub ids or .gguf files.
    """
    options = options or Options()
    results: list[Result] = []
    try:
        evaluate(models, options, results)
    finally:  # what was found is shown whatever happened to the rest, Ctrl-C included
        if any(result.found for result in results):
            if options.json:
                print(json.dumps({"results": [result.as_dict() for result in results]}))
            else:
                _show(results, options)
            sys.stdout.flush()


def evaluate(models: Sequence[str], options: Options, results: list[Result] | None = None) -> list[Result]:
    """Everything that `options` asks for, of every model in turn; put into `results` as soon as it is found.

    All faults of the request are one ConfigurationError before anything is loaded. A fault of one model, or a
    wanda.json that cannot be updated, keeps no other model from being measured; what was amiss is one error at the end:
    RunError, or ConfigurationError where nothing was measured and every model was refused.
    """
    from wanda.checkpoint.source import load_tokenizer
    from wanda.evaluation.models import load
    from wanda.evaluation.perplexity import measure, text_windows
    from wanda.evaluation.tasks import load_tasks, mean_of_paper

    results = [] if results is None else results
    if options.images is not None:
        return _evaluate_images(models, options, results)
    folders, seqlen = _check(models, options)
    tasks = [name for part in options.tasks for name in part.split(",") if name]
    suite = None
    if tasks:
        suite = load_tasks(tasks, fewshot=options.fewshot, data=options.data, include_path=options.include_path)
    text = options.text or (None if tasks else "builtin")
    trust = options.trust_remote_code
    reference: Any = None
    if options.against is not None and not options.stream:
        reference = load(folders[options.against], options.dtype, options.device, trust)

    def one(result: Result) -> None:
        tokenizer = load_tokenizer(result.folder, trust)
        model: Any = None if options.stream else load(result.folder, options.dtype, options.device, trust)
        if text is not None:
            ids, label = text_windows(text, tokenizer, seqlen, options.windows)
            _log(f"{result.model}: perplexity on {label}, {len(ids)} windows of {seqlen} tokens")
            dense = reference
            if options.stream:
                batch = options.batch or 1
                model = _streamed(result.folder, ids, batch, options)
                dense = None if options.against is None else _streamed(folders[options.against], ids, batch, options)
                outside = measure(model, ids, label, dense=dense, batch=batch)
                blocks = model.seconds + (0.0 if dense is None else dense.seconds)  # a model in memory has them inside
                result.perplexity = replace(outside, seconds=outside.seconds + blocks)
            else:
                result.perplexity = measure(model, ids, label, dense=dense, batch=options.batch)
            _log(f"{result.model}: {_perplexity(result.perplexity)}")
            values = result.perplexity.as_dict() | {"against": options.against}
            result.keep("perplexity", {f"{label}, {len(ids)} windows of {seqlen} tokens": values})
        if suite is not None:

            def scored(score: Score) -> None:
                result.scores.append(score)
                _log(f"{result.model}: {score.task} {score.text()}")

            try:
                suite.run(model, tokenizer, options.limit, options.batch or 8, scored)
            finally:
                result.mean = mean_of_paper(result.scores)
                if result.scores:
                    result.keep("tasks", _entries(result, options.limit))

    return _in_turn(models, folders, results, one)


def _in_turn(
    models: Sequence[str], folders: Mapping[str, Path], results: list[Result], one: Callable[[Result], None]
) -> list[Result]:
    """Measure one model after the other; raises what was amiss with any of them when all have had their turn."""
    for turn, name in enumerate(models, 1):
        result = Result(name, folders[name])
        results.append(result)
        try:
            one(result)
        except WandaError as error:
            result.fault = _fault_of(name, error)
            if turn < len(models):
                _log(f"{result.fault}; the other models are measured all the same")
        except KeyboardInterrupt:
            result.fault = RunError(f"{name}: stopped before it was measured in full")
            raise
        gc.collect()  # modules hold cycles, and the next model needs the room now
    errors = [result.fault for result in results if result.fault is not None]
    if errors and not any(result.found for result in results):
        refused = [error for error in errors if isinstance(error, ConfigurationError)]
        if len(refused) == len(errors):
            raise ConfigurationError(list(dict.fromkeys(fault for error in refused for fault in error.faults)))
    said = [*map(str, errors), *(result.unkept for result in results if result.unkept is not None)]
    if said:
        raise RunError("\n".join(dict.fromkeys(said)))
    return results


def _fault_of(model: str, error: WandaError) -> WandaError:
    """The error with the model's name; a new one, since the frames of the old one would keep the model in memory."""
    faults = error.faults if isinstance(error, ConfigurationError) else (str(error),)
    named = [fault if fault.startswith(model) else f"{model}: {fault}" for fault in faults]
    return ConfigurationError(named) if isinstance(error, ConfigurationError) else RunError(named[0])


def _entries(result: Result, limit: int | None) -> dict[str, dict[str, Any]]:
    """What is kept of tasks; by names that tell other numbers of examples and records apart."""
    from wanda.evaluation.tasks import PAPER

    of_records = "" if limit is None else f", limit {limit}"

    def name(task: str, fewshot: int | None) -> str:
        return f"{task}, {'mixed' if fewshot is None else fewshot}-shot{of_records}"

    kept = {name(score.task, score.fewshot): vars(score) | {"limit": limit} for score in result.scores}
    if result.mean is not None:
        numbers = {score.fewshot for score in result.scores if score.task in PAPER}
        fewshot = numbers.pop() if len(numbers) == 1 else None
        values = {"metric": "acc", "value": result.mean, "fewshot": fewshot, "limit": limit}
        kept[name("mean of the paper's seven", fewshot)] = values
    return kept


def _evaluate_images(models: Sequence[str], options: Options, results: list[Result]) -> list[Result]:
    """`evaluate` for image classifiers: their accuracy."""
    from wanda.checkpoint.source import classifies_images, load_classifier, load_config, resolve
    from wanda.device import pick_device
    from wanda.evaluation.accuracy import measure
    from wanda.images import faults as image_faults
    from wanda.images import load_processor

    assert options.images is not None
    faults = [] if models else ["no model is named: wanda eval MODEL [MODEL ...]"]
    of_text = ("text", "seqlen", "windows", "against", "fewshot", "data", "include_path")
    given = [name for name in of_text if getattr(options, name) is not None]
    given += [name for name in ("tasks", "stream") if getattr(options, name)]
    if given:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        faults.append(f"{flags} would change nothing beside --images, which measures image classifiers; leave it out")
    for option in ("batch", "limit"):
        value = getattr(options, option)
        if value is not None and value < 1:
            faults.append(f"--{option} {value} has to be at least 1")
    faults += image_faults(options.images)
    try:
        pick_device(options.device)
    except ConfigurationError as error:
        faults += error.faults
    folders = {}
    for name in dict.fromkeys(models):
        try:
            folders[name] = resolve(name, options.trust_remote_code)
            if not classifies_images(load_config(folders[name], options.trust_remote_code)):
                faults.append(f"{name} is no image classifier; measure language models with --text or --tasks")
            else:
                load_processor(folders[name], options.trust_remote_code)
        except ConfigurationError as error:
            faults += [fault if name in fault else f"{name}: {fault}" for fault in error.faults]
    if faults:
        raise ConfigurationError(faults)
    source = options.images

    def one(result: Result) -> None:
        model = load_classifier(result.folder, options.dtype, options.device, options.trust_remote_code)
        processor = load_processor(result.folder, options.trust_remote_code)
        accuracy = measure(
            model,
            processor,
            source,
            limit=options.limit,
            batch=options.batch or 32,
            skip_unreadable=options.skip_unreadable,
        )
        result.accuracy = accuracy
        for note in accuracy.notes:
            _log(f"{result.model}: {note}")
        _log(f"{result.model}: top-1 {accuracy.top1:.2%} ± {accuracy.top1_error:.2%}")
        result.keep("images", {f"{accuracy.source}, {accuracy.images} images": accuracy.as_dict()})

    return _in_turn(models, folders, results, one)


def _streamed(folder: Path, ids: Any, batch: int, options: Options) -> Any:
    from wanda.evaluation.stream import Streamed

    return Streamed(folder, list(ids.split(batch)), options.dtype, options.device, options.trust_remote_code)


def _check(models: Sequence[str], options: Options) -> tuple[dict[str, Path], int]:
    """The folder of every model named, and the tokens of a window; nothing heavy is loaded before this returns."""
    from wanda.calibration import check_source
    from wanda.checkpoint.source import check_folder, classifies_images, load_config, resolve
    from wanda.device import pick_device
    from wanda.evaluation.models import check
    from wanda.evaluation.perplexity import window_length

    faults = [] if models else ["no model is named: wanda eval MODEL [MODEL ...]"]
    for option in ("windows", "batch", "limit"):
        value = getattr(options, option)
        if value is not None and value < 1:
            faults.append(f"--{option} {value} has to be at least 1")
    if options.text is not None:
        faults += check_source(options.text)
    elif options.tasks:
        faults += _unused(options, ("against", "seqlen", "windows"), "without a text (--text)")
    if not options.tasks:
        faults += _unused(options, ("fewshot", "limit", "data", "include_path"), "without tasks (--tasks)")
    if options.skip_unreadable:
        faults.append("--skip-unreadable would change nothing without images (--images); leave it out")
    if options.stream and options.tasks:
        faults.append("--stream measures perplexity only; leave out --tasks, or --stream")
    try:
        pick_device(options.device)
    except ConfigurationError as error:
        faults += error.faults
    folders, lengths = {}, []
    if not faults:
        for name in dict.fromkeys([*models, *([options.against] if options.against is not None else [])]):
            try:
                folders[name] = resolve(name, options.trust_remote_code, packed=True)
                check(folders[name], options.dtype, options.device)
                if options.stream:
                    check_folder(folders[name])
                config = load_config(folders[name], options.trust_remote_code)
                if classifies_images(config):
                    raise ConfigurationError(f"{name} is an image classifier; measure it with --images FOLDER")
                lengths.append(window_length(config, options.seqlen))
            except ConfigurationError as error:
                faults += [fault if name in fault else f"{name}: {fault}" for fault in error.faults]
    if faults:
        raise ConfigurationError(faults)
    return folders, min(lengths)


def _unused(options: Options, names: Sequence[str], without: str) -> list[str]:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    return [f"{' and '.join(given)} would change nothing {without}; name what to measure"] if given else []


def _perplexity(found: Perplexity) -> str:
    return f"perplexity {found.perplexity:.4g}" + ("" if found.kl is None else f", KL {found.kl:.4f}")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(results: Sequence[Result], options: Options) -> None:
    """The results as tables that fit the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)
    measured = [(result.model, result.perplexity) for result in results if result.perplexity is not None]
    if measured:
        first = measured[0][1]
        table = Table(title=f"{first.text}: {first.windows} windows of {first.seqlen} tokens", title_justify="left")
        table.add_column("model", overflow="fold")
        names = ["perplexity", *(["KL"] if options.against else []), "tokens", "seconds", "dtype"]
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for model, found in measured:
            kl = [] if found.kl is None else [f"{found.kl:.4f}"]
            table.add_row(
                model, f"{found.perplexity:.4g}", *kl, f"{found.tokens:,}", f"{found.seconds:.1f}", found.dtype
            )
        console.print(table)
        if options.against:
            console.print(f"KL: mean divergence from {options.against}, nats a token")
    accuracies = [(result.model, result.accuracy) for result in results if result.accuracy is not None]
    if accuracies:
        table = Table(title=f"{accuracies[0][1].source}: {accuracies[0][1].images} images", title_justify="left")
        table.add_column("model", overflow="fold")
        for name in ("top-1", "top-5", "images/s", "dtype"):
            table.add_column(name, justify="right", no_wrap=True)
        for model, share in accuracies:
            top5 = "-" if share.top5 is None else f"{share.top5:.2%} ± {share.top5_error:.2%}"
            rate = f"{share.images_per_second:.1f}"
            table.add_row(model, f"{share.top1:.2%} ± {share.top1_error:.2%}", top5, rate, share.dtype)
        console.print(table)
    scored = [result for result in results if result.scores]
    if scored:
        table = Table(title="tasks", title_justify="left")
        table.add_column("task")
        for result in scored:
            table.add_column(result.model, justify="right", overflow="fold")
        shown = [{score.task: score.text() for score in result.scores} for result in scored]
        for task in dict.fromkeys(task for cells in shown for task in cells):
            table.add_row(task, *(cells.get(task, "-") for cells in shown))  # -: a model that was stopped before it
        if any(result.mean is not None for result in scored):
            means = ("-" if result.mean is None else f"{result.mean:.2%}" for result in scored)
            table.add_row("mean of the paper's seven", *means)
        console.print(table)
