"""The pipeline: checkpoint -> blocks -> statistics -> scores -> masks -> weights -> checkpoint + report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanda import sources
from wanda.block_loop import BlockLoop
from wanda.blocks import find_blocks
from wanda.checkpoint.folder import followed, partial_folder
from wanda.checkpoint.tensors import Entry, bytes_of
from wanda.checkpoint.writer import Writer, finished
from wanda.device import available_memory
from wanda.errors import ConfigurationError, RunError
from wanda.memory import peak_memory
from wanda.methods import METHODS
from wanda.parallel import Ranks
from wanda.plan import BATCH_TOKENS, EXPERTS_SHARE, Choices, Plan, choose, make_plan, needs_of
from wanda.recipe import Recipe, make_recipe
from wanda.report import Report
from wanda.report.card import model_card
from wanda.report.progress import Progress
from wanda.report.tables import print_start
from wanda.shared import Shared
from wanda.statistics import Needs
from wanda.weights import Matrix

_OF_CHECKPOINTS = frozenset(
    ("calibration", "samples", "seqlen", "seed", "skip_unreadable", "dtype", "device", "memory", "trust_remote_code")
)  # options that a model in memory has no use for
_OF_WALKS = frozenset(("propagate", "batch", "experts", "expert_tokens"))  # and those of a pass through the blocks


def prune(
    model: str | Path,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    command: str | None = None,
    ranks: Ranks | None = None,
    shared: Path | None = None,
    **options: Any,
) -> Report | Plan:
    """Prune a checkpoint into another one, a block at a time; the whole model is never in memory.

    model: a Hugging Face folder, a hub id or a .gguf file. out: the folder to write; whole or absent.
    recipe, or options: the fields of Recipe, which are the command line's flags.
    overwrite: replace a non-empty `out`. resume: go on with a run that was killed, ending in the same bytes; nothing is
    done when `out` holds the result of this very run.
    dry_run: return the Plan, loading no weights. progress: show a bar, or log lines without a terminal.
    command: the command line to be told in the model card.
    ranks: the processes that share the run, each of which calls this; see wanda.parallel.
    shared: an existing folder in which runs on this very model keep what the next ones need too: the calibration's
    token ids, an allocation's figures of the dense blocks. Seconds and memory reported are those of a run by itself.
    Returns the Report that is also written to `out`/wanda.json. Raises ConfigurationError with all faults, before
    anything is loaded or written; RunError for a fault on the way, leaving a resumable `out`.partial.
    """
    ranks = ranks or Ranks()
    recipe = make_recipe(options, recipe)
    if dry_run and shared is not None:
        raise ConfigurationError("a dry run computes nothing that --shared could keep; leave one of them away")
    out = followed(Path(out))
    plan = ranks.in_turn(lambda: make_plan(model, out, recipe, overwrite, resume, ranks.world, ranks.neighbours))
    ranks.connect(plan.skeleton.device)
    _same_plan(plan, ranks)
    if dry_run:
        return plan
    if progress and ranks.leads and (plan.asked.memory is not None or plan.choices != plan.wanted):
        print_start(plan)
    start = time.perf_counter()
    common = Shared(shared, ranks.world)
    tokens, notes = _calibration(plan, common) if ranks.leads else (None, [])
    tokens = ranks.tokens(tokens)
    identity = {
        "recipe": plan.asked.as_dict(),
        "input": plan.checkpoint.structure(),
        "calibration": None if tokens is None else hashlib.sha256(bytes_of(tokens.contiguous())).hexdigest(),
    }
    blocks = [plan.skeleton.block_keys(index) for index in range(len(plan.skeleton.blocks))]
    if resume:
        earlier = ranks.first(finished(plan.out, plan.checkpoint, blocks, identity, overwrite) if ranks.leads else None)
        if earlier is not None:
            report = Report.from_dict(earlier)
            report.notes.insert(0, f"{plan.out} holds the result of this run already: nothing was done")
            return report
    writer = Writer(plan.out, plan.checkpoint, blocks, identity, resume, overwrite) if ranks.leads else None
    with _resumable(plan, writer):
        if writer is not None and "choices" not in writer.facts:
            writer.note(choices=dataclasses.asdict(plan.choices))
        loop = BlockLoop(
            plan.skeleton,
            plan.recipe,
            plan.matrices,
            tokens,
            plan.batch,
            plan.activation_folder,
            ranks,
            plan.experts_memory,
            common,
        )
        with Progress(len(plan.matrices), progress and ranks.leads) as bar:
            loop.run(bar, writer)
        seconds = time.perf_counter() - start + common.seconds
        report = Report.of(plan, loop.pruner.rows, [*notes, *common.notes()], seconds, command)
        report.peak_memory_bytes = max(report.peak_memory_bytes, common.peak_memory)
        if writer is not None:
            report.identity = writer.write_rest()
            writer.finish(
                {"wanda.json": report.json(), "README.md": model_card(report, METHODS.summary(plan.recipe.method))}
            )
        ranks.exchange(None)  # all end well, or none
    return report


@contextlib.contextmanager
def _resumable(plan: Plan, writer: Writer | None) -> Iterator[None]:
    """Whatever stops a run is told with what is kept of it."""
    try:
        yield
    except KeyboardInterrupt:
        if writer is not None and not writer.folder.exists():  # it is all done
            raise
        raise KeyboardInterrupt(f"{partial_folder(plan.out)} keeps what is finished: go on with --resume") from None
    except RunError as error:
        if writer is None or not writer.folder.exists():
            raise
        writer.close()  # the last block may still be on its way to the disk
        kept = f"{len(writer.done)} finished blocks are kept in {writer.folder}: mend it, then go on with --resume"
        raise RunError(f"{error}\n{kept}") from error
    finally:
        if writer is not None:
            writer.close()


def _calibration(plan: Plan, shared: Shared) -> tuple[Tensor | None, list[str]]:
    """The plan's calibration and notes on it; token ids are shared, images (which are large and quickly read) not."""
    if not plan.calibrated or plan.image is not None:
        return plan.calibration_tokens()

    def make() -> dict[str, Any]:
        tokens, notes = plan.calibration_tokens()
        assert tokens is not None
        return {"ids": tokens.tolist(), "notes": notes}

    recipe = plan.recipe

    def depends() -> dict[str, Any]:
        content = sources.identity(recipe.calibration)
        return {"text": content, "samples": recipe.samples, "seed": recipe.seed, "seqlen": plan.seqlen}

    kept = shared.take("the calibration's token ids", depends, make)
    return torch.tensor(kept["ids"], dtype=torch.int64), kept["notes"]


def _same_plan(plan: Plan, ranks: Ranks) -> None:
    """Take the first rank's choices; refuse a rank with another input, device or type."""
    tensors = sorted((key, str(entry.dtype), list(entry.shape)) for key, entry in plan.checkpoint.entries.items())
    same = {
        "the same input": hashlib.sha256(json.dumps(tensors).encode()).hexdigest(),
        "the same --dtype": str(plan.skeleton.dtype),
        "the same kind of --device": plan.skeleton.device.type,
    }
    first, choices, plan.experts_memory = ranks.first([same, dataclasses.asdict(plan.choices), plan.experts_memory])
    different = [f"{what} (here {same[what]}, there {first[what]})" for what in same if same[what] != first[what]]
    if different:
        raise ConfigurationError(f"{ranks} differs from the first: give all ranks {' and '.join(different)}")
    plan.take(Choices(**choices))


def prune_model(
    model: nn.Module, token_ids: Tensor | None = None, *, recipe: Recipe | None = None, **options: Any
) -> Report:
    """Prune a causal language model or an image classifier in memory, in place.

    model: a transformers model on one device. token_ids: [samples, seqlen], without padding, or for a classifier images
    [samples, channels, height, width]; None for methods that need no calibration.
    recipe, or options: the fields of Recipe that concern a model in memory; others are refused.
    Returns the Report. Raises ConfigurationError before anything is changed, RunError on the way.
    """
    start = time.perf_counter()
    recipe = make_recipe(options, recipe)
    parts = _InMemory(model)
    matrices, dense, faults = choose(model, parts.blocks, recipe)
    given = recipe.changed()
    unused = given & _OF_CHECKPOINTS
    if unused:
        faults.append(
            f"{', '.join(sorted(unused))} would be ignored: the model is in memory, and token_ids are what it is "
            "calibrated with; leave them out"
        )
    faults = recipe.faults(text=False) + faults
    if not faults:
        recipe = recipe.resolved(text=False)
        if token_ids is None and needs_of(recipe) > Needs.NOTHING:
            faults.append(f"the method {recipe.method} needs calibration: pass token_ids")
    chain = parts.blocks.chain
    wanted = "[samples, seqlen]" if chain is None else "[samples, channels, height, width]"
    if token_ids is not None and (token_ids.ndim != (2 if chain is None else 4) or 0 in token_ids.shape):
        faults.append(f"token_ids has shape {list(token_ids.shape)}; it must be {wanted}, none of them 0")
    if faults:
        raise ConfigurationError(faults)
    tokens = token_ids if needs_of(recipe) > Needs.NOTHING else None
    idle = sorted(given & _OF_WALKS) if tokens is None else []
    idle += ["token_ids"] if token_ids is not None and tokens is None else []
    notes = [f"not used, since {recipe.method} needs no calibration: {', '.join(idle)}"] if idle else []
    length = chain.positions if chain is not None else BATCH_TOKENS if token_ids is None else token_ids.shape[1]
    batch = recipe.batch or max(1, BATCH_TOKENS // length)
    training = {module: module.training for module in model.modules()}
    model.eval()
    available = available_memory(parts.device)
    loop = BlockLoop(
        parts, recipe, matrices, tokens, batch, experts_memory=None if available is None else available // EXPERTS_SHARE
    )
    try:
        with _experts_one_by_one(model, matrices):
            loop.run(Progress(len(matrices), shown=False))
    finally:
        for module, mode in training.items():
            module.training = mode
    calibration: dict[str, Any] = {"used": tokens is not None}
    if tokens is not None:
        size = {"seqlen": tokens.shape[1]} if chain is None else {"image": list(tokens.shape[1:])}
        calibration |= {"source": "token_ids", "samples": tokens.shape[0]} | size | {"seed": None}
    return Report(
        model=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        recipe=recipe.as_dict(),
        layers=loop.pruner.rows,
        left_dense=dense,
        calibration=calibration,
        seconds=round(time.perf_counter() - start, 2),
        peak_memory_bytes=peak_memory(),
        model_weights=sum(p.numel() for p in model.parameters()),
        notes=notes,
    )


@contextlib.contextmanager
def _experts_one_by_one(model: Any, matrices: Sequence[Sequence[Matrix]]) -> Iterator[None]:
    """transformers' grouped products hide which expert multiplies what: meanwhile experts run in its plain loop."""
    if not any(matrix.expert is not None for block in matrices for matrix in block):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class _InMemory:
    """The parts of a model that is whole in memory and stays so."""

    def __init__(self, model: nn.Module):
        self.model, self.blocks = model, find_blocks(model)
        self.device = next(model.parameters()).device

    def load_block(self, index: int, entries: Mapping[str, Entry] | None = None) -> dict[str, Tensor]:
        prefix = self.blocks.prefix(index)
        return {prefix + name: p.data for name, p in self.blocks.modules[index].named_parameters()}

    def drop_block(self, index: int) -> None: ...

    def load_outside(self) -> None: ...

    def drop_outside(self) -> None: ...
