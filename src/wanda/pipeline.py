"""The pipeline: checkpoint -> blocks -> statistics -> scores -> masks -> weights -> checkpoint + report."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wanda import sources
from wanda.activations import Activations
from wanda.allocation import ALLOCATIONS, Allocation, BlockMeasure, share_out
from wanda.blocks import Blocks, Call, find_blocks, record
from wanda.checkpoint.tensors import Entry, bytes_of
from wanda.checkpoint.writer import Writer, finished, partial_folder
from wanda.composition import Composition, finite
from wanda.device import available_memory
from wanda.errors import ConfigurationError, RunError, near
from wanda.kernels.selection import clear_lost
from wanda.memory import FreedMemory, peak_memory, ran_out
from wanda.methods import METHODS
from wanda.parallel import Ranks
from wanda.patterns import Pattern, Unstructured, Variant, exact
from wanda.plan import BATCH_TOKENS, EXPERTS_SHARE, Choices, Plan, choose, make_plan, needs_of, pattern_of
from wanda.recipe import Recipe
from wanda.report import Report
from wanda.report.card import model_card
from wanda.report.progress import Progress
from wanda.report.tables import print_start
from wanda.shared import Shared
from wanda.statistics import Needs, Statistics
from wanda.walk import Job, Walk
from wanda.weights import Matrix

_OF_CHECKPOINTS = frozenset(
    ("calibration", "samples", "seqlen", "seed", "skip_unreadable", "dtype", "device", "memory", "trust_remote_code")
)  # options that a model in memory has no use for


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
    plan = ranks.in_turn(lambda: make_plan(model, Path(out), recipe, overwrite, resume, ranks.world, ranks.neighbours))
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
    try:
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
    return report


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
    unused = recipe.changed() & _OF_CHECKPOINTS
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
    length = chain.positions if chain is not None else BATCH_TOKENS if token_ids is None else token_ids.shape[1]
    batch = recipe.batch or max(1, BATCH_TOKENS // length)
    training = model.training
    model.eval()
    available = available_memory(parts.device)
    loop = BlockLoop(
        parts, recipe, matrices, tokens, batch, experts_memory=None if available is None else available // EXPERTS_SHARE
    )
    try:
        with _experts_one_by_one(model, matrices):
            loop.run(Progress(len(matrices), shown=False))
    finally:
        model.train(training)
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


def make_recipe(options: Mapping[str, Any], recipe: Recipe | None = None) -> Recipe:
    """The recipe, or one from keyword options.

    Raises ConfigurationError for an option that does not exist, or that would be ignored beside a recipe.
    """
    known = set(Recipe.__dataclass_fields__)
    unknown = [f"there is no option {name!r}: {near(name, known)}" for name in options if name not in known]
    if recipe is not None:
        ignored = [name for name in options if name in known]
        if ignored:
            unknown.append(f"{' and '.join(ignored)} would be ignored beside a recipe: say it there")
        if not unknown:
            return recipe
    if unknown:
        raise ConfigurationError(unknown)
    values = dict(options)
    if isinstance(values.get("sparsity_of"), Mapping):
        values["sparsity_of"] = [f"{glob}={share}" for glob, share in values["sparsity_of"].items()]
    for name in ("include", "exclude", "sparsity_of"):
        if name in values:
            values[name] = (values[name],) if isinstance(values[name], str) else tuple(values[name])
    return Recipe(**values)


class _Parts(Protocol):
    """A model whose blocks can be filled and emptied: a Skeleton, or a model that is in memory anyway."""

    model: Any
    blocks: Blocks
    device: torch.device

    def load_block(self, index: int, entries: Mapping[str, Entry] | None = None) -> dict[str, Tensor]: ...
    def drop_block(self, index: int) -> None: ...
    def load_outside(self) -> None: ...
    def drop_outside(self) -> None: ...


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


class Pruner:
    """Prunes matrices by a resolved recipe, in place, and keeps the rows of the report."""

    def __init__(self, recipe: Recipe):
        assert recipe.update is not None and recipe.inherit is not None
        self.recipe = recipe
        self.composition = Composition(recipe.score, recipe.update, recipe.inherit)
        self.patterns: dict[str, Pattern] = {}
        self.rows: list[dict[str, Any]] = []

    def solve(
        self, matrix: Matrix, statistics: Statistics | None, block: int, stored: Tensor, computed: Tensor
    ) -> None:
        """Prune one matrix.

        stored: its parameter as on disk; computed: its parameter in the model (the same memory, or another type).
        statistics: None when none are needed, or for an expert that saw no token.
        """
        start = time.perf_counter()
        pattern, composition = self.patterns[matrix.name], self.composition
        notes: list[str] = []
        tokens = 0 if statistics is None else statistics.tokens
        if matrix.expert is not None and composition.needs > Needs.NOTHING and tokens < self.recipe.expert_tokens:
            notes.append(f"saw {tokens} calibration tokens: pruned by magnitude per row")
            composition, statistics = Composition("magnitude"), None
            if isinstance(pattern, (Variant, Unstructured)):
                pattern = Unstructured(
                    pattern.sparsity, "row", spread=isinstance(pattern, Unstructured) and pattern.spread
                )
        if statistics is None:
            statistics = Statistics(matrix.width, Needs.NOTHING, computed.device)
        view = matrix.view(stored)
        weight = matrix.view(computed) if computed.dtype == stored.dtype else view.to(computed.device)
        removed, errors = 0, []
        for rows in composition.panels(pattern, matrix.out, matrix.width):
            pruned = composition.prune(weight[rows].float(), statistics, pattern, matrix.name)
            if composition.update == "none":
                clear_lost(view[rows], pruned.mask.to(view.device))  # survivors keep their bits
            else:
                view[rows].copy_(clear_lost(pruned.weight.to(view.dtype), pruned.mask))
            removed += pruned.mask.numel() - int(torch.count_nonzero(pruned.mask))  # a sum of bools: 16 times as long
            errors.append(pruned.error)
        if computed.data_ptr() != stored.data_ptr():
            matrix.view(computed).copy_(view)
        known = [error for error in errors if error is not None]
        error = sum(known[1:], known[0]) if known else None
        self.rows.append(
            {
                "name": matrix.name,
                "block": block,
                "shape": [matrix.out, matrix.width],
                "pattern": pattern.text,
                "removed": removed,
                "sparsity": removed / matrix.numel,
                "relative_error": None if error is None else error.relative,
                "error": None if error is None else "exact" if error.exact else "diagonal estimate",
                "tokens": tokens,
                "seconds": round(time.perf_counter() - start, 4),
                "notes": [*notes, *pruned.notes],
            }
        )


class BlockLoop:
    """The loop over the blocks: record, share the sparsity out, prune block after block."""

    def __init__(
        self,
        parts: _Parts,
        recipe: Recipe,
        matrices: Sequence[Sequence[Matrix]],
        tokens: Tensor | None,
        batch: int,
        activation_folder: Path | None = None,
        ranks: Ranks | None = None,
        experts_memory: int | None = None,
        shared: Shared | None = None,
    ):
        self.shared = shared or Shared()
        self.experts_memory = experts_memory
        self.parts, self.recipe, self.matrices, self.batch = parts, recipe, matrices, batch
        self.ranks = ranks or Ranks()
        self.tokens = None if tokens is None else self.ranks.split(tokens, batch)
        self.activation_folder = activation_folder
        self.pruner = Pruner(recipe)

    @torch.no_grad()
    def run(self, progress: Progress, writer: Writer | None = None) -> None:
        """Prune all blocks; blocks the first rank's writer has already are replayed, the others handed to it."""
        done = self.ranks.first([] if writer is None else list(writer.done))
        if len(done) == len(self.matrices):  # stopped while the result was put together
            self.pruner.rows += [row for rows in done for row in rows]
            return
        with contextlib.ExitStack() as stack:
            hidden = None if self.tokens is None else Activations([], self.activation_folder)
            if hidden is not None:
                stack.callback(hidden.close)
            calls = self._record(hidden)
            self.pruner.patterns = self._patterns(self._sparsities(progress, calls, hidden, writer))
            dense = hidden.copy() if hidden is not None and self.recipe.inherit else None
            if dense is not None:
                stack.callback(dense.close)
            self._blocks(progress, writer, done, calls, hidden, dense)

    def _blocks(
        self,
        progress: Progress,
        writer: Writer | None,
        done: list[list[dict[str, Any]]],
        calls: list[list[Call]],
        hidden: Activations | None,
        dense: Activations | None,
    ) -> None:
        freed = FreedMemory()
        for index in range(len(self.matrices)):
            if index < len(done):
                entries = writer.block_entries(index) if writer and self.recipe.propagate != "none" else None
                self._replay(index, calls[index], hidden, dense, entries)
                self.pruner.rows += done[index]
            else:
                with self._told_of_memory(index):
                    stored = self.parts.load_block(index)
                    self._prune(index, stored, calls[index], hidden, dense)
                if writer is not None:
                    writer.write_block(index, self._shard(index, stored), self._rows(index))
                self.parts.drop_block(index)
                stored.clear()  # or this block stays beside the next one
            freed.give_back()
            calls[index] = []
            progress.block(index, self._rows(index))

    @contextlib.contextmanager
    def _told_of_memory(self, index: int) -> Iterator[None]:
        """An allocation that fails becomes a RunError, which names the block: no plan can see every limit."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            largest = max(self.matrices[index], key=lambda matrix: matrix.numel, default=None)
            what = f" (its largest matrix: {largest.name})" if largest is not None else ""
            raise RunError(
                f"memory ran out in block {index + 1} of {len(self.matrices)}{what}: something outside this program"
                " limits it (ulimit, a container, an accelerator); name the limit with --memory, so that the plan keeps"
                " to it, and start anew with --overwrite"
            ) from error

    def _record(self, hidden: Activations | None) -> list[list[Call]]:
        """The arguments of every block (per block, per micro-batch); `hidden` gets what enters the first."""
        if self.tokens is None or hidden is None or not len(self.tokens):  # fewer micro-batches than ranks
            return [[] for _ in self.matrices]
        self.parts.load_outside()
        batches = [part.to(self.parts.device) for part in self.tokens.split(self.batch)]
        recording = record(self.parts.model, self.parts.blocks, batches, hidden)
        self.parts.drop_outside()
        return [list(calls) for calls in zip(*recording.calls, strict=True)]

    def _sparsities(
        self, progress: Progress, calls: list[list[Call]], hidden: Activations | None, writer: Writer | None
    ) -> list[Fraction]:
        """The sparsity of every block; one more dense pass over the model when the allocation measures."""
        known = self.ranks.first(None if writer is None else writer.facts.get("sparsities"))
        if known is not None:
            return [Fraction(text) for text in known]
        assert self.recipe.allocation is not None
        allocation = ALLOCATIONS.get(self.recipe.allocation)
        values = [0.0] * len(self.matrices)
        if allocation.measures:
            values = self.shared.take(
                f"{allocation.name}'s figures of the dense blocks",
                self._dense_run,
                lambda: self._measures(allocation, progress, calls, hidden, writer),
            )
        asked = pattern_of(self.recipe, exact(self.recipe.sparsity or 0)).sparsity
        weights = [sum(matrix.numel for matrix in matrices) for matrices in self.matrices]
        measures = [BlockMeasure(*pair) for pair in zip(self.ranks.first(values), weights, strict=True)]
        sparsities = allocation.allocate(measures, asked)
        if writer is not None:
            for index in range(len(measures) if allocation.measures else 0):
                writer.look_at(index)  # again where they were measured here, which costs nothing
            writer.note(sparsities=[str(sparsity) for sparsity in sparsities])
        return sparsities

    def _dense_run(self) -> dict[str, Any]:
        """All that a pass over the dense blocks depends on, for one model."""
        first = next(self.parts.model.parameters())
        return {
            "matrices": [matrix.name for block in self.matrices for matrix in block],
            "tokens": None if self.tokens is None else hashlib.sha256(bytes_of(self.tokens.contiguous())).hexdigest(),
            "batch": self.batch,
            "experts": self.recipe.experts,
            "runs": [str(self.parts.device), str(first.dtype)],
        }

    def _measures(
        self,
        allocation: Allocation,
        progress: Progress,
        calls: list[list[Call]],
        hidden: Activations | None,
        writer: Writer | None,
    ) -> list[float]:
        """The allocation's figure of every dense block, in a pass of its own."""
        values = []
        stream = hidden.copy() if hidden is not None and allocation.needs > Needs.NOTHING else None
        for index in range(len(self.matrices)):
            values.append(float(self._measure(allocation, index, calls[index], stream)))
            if writer is not None:
                writer.look_at(index)
            progress.measured(index)
        if stream is not None:
            stream.close()
        return values

    def _measure(self, allocation: Allocation, index: int, calls: list[Call], stream: Activations | None) -> float:
        """The allocation's figure of a dense block; moves the stream on."""
        stored = self.parts.load_block(index)
        gathered: Mapping[str, Statistics] = {}
        if stream is not None:
            walk = self._walk(index, calls, stream, None, allocation.needs)
            if self.matrices[index]:
                walk.gather()
            walk.forward()
            gathered = walk.statistics
            self._check(stream, index)
        pairs = [
            (
                matrix.view(stored[matrix.parameter]).to(self.parts.device),
                gathered.get(matrix.name) or Statistics(matrix.width, allocation.needs, self.parts.device),
            )
            for matrix in self.matrices[index]
        ]
        for (weight, _), matrix in zip(pairs, self.matrices[index], strict=True):
            if not finite(weight):
                raise RunError(f"{matrix.name} has weights that are not finite (NaN or Inf); mend the input")
        value = allocation.measure(pairs) if pairs else 0.0
        self.parts.drop_block(index)
        return value

    def _patterns(self, sparsities: list[Fraction]) -> dict[str, Pattern]:
        """The pattern of every matrix; --sparsity-of goes before the allocation, which shares out the rest exactly."""
        base = pattern_of(self.recipe, exact(self.recipe.sparsity or 0))
        free = [[m for m in block if self.recipe.sparsity_for(m.name) is None] for block in self.matrices]
        shared = share_out([[(m.out, m.width) for m in block] for block in free], sparsities, base)
        patterns = {m.name: p for ms, ps in zip(free, shared, strict=True) for m, p in zip(ms, ps, strict=True)}
        for block in self.matrices:
            for matrix in block:
                own = self.recipe.sparsity_for(matrix.name)
                if own is not None:
                    patterns[matrix.name] = pattern_of(self.recipe, own)
        return patterns

    def _prune(
        self,
        index: int,
        stored: dict[str, Tensor],
        calls: list[Call],
        hidden: Activations | None,
        dense: Activations | None,
    ) -> None:
        prefix, block = self.parts.blocks.prefix(index), self.parts.blocks.modules[index]
        computed = {prefix + name: parameter for name, parameter in block.named_parameters()}
        solved: set[str] = set()

        def solve(jobs: Sequence[Job]) -> None:
            solved.update(matrix.name for matrix, _, _ in jobs)
            self._solve(index, jobs, stored, computed)

        everyone = range(self.ranks.world)
        if hidden is None:
            solve([(matrix, None, everyone) for matrix in self.matrices[index]])
            return
        walk = self._walk(index, calls, hidden, dense, self.pruner.composition.needs)
        assert self.recipe.propagate is not None
        ways = {"none": walk.prune_from_dense, "block": walk.prune_by_block, "layer": walk.prune_by_layer}
        ways[self.recipe.propagate](solve)
        unseen = [matrix for matrix in self.matrices[index] if matrix.name not in solved]
        seen = {matrix.parameter for matrix in self.matrices[index] if matrix.name in solved}
        chosen = Counter(matrix.parameter for matrix in self.matrices[index])
        for matrix in unseen:
            every = matrix.expert is None or chosen[matrix.parameter] == len(computed[matrix.parameter])
            if every and matrix.parameter not in seen:  # some experts may well get no token, all cannot
                raise RunError(
                    f"{matrix.name} was not multiplied with anything in the forward pass, so that it has no "
                    "statistics; leave it dense with --exclude"
                )
        solve([(matrix, None, everyone) for matrix in unseen])
        place = {matrix.name: number for number, matrix in enumerate(self.matrices[index])}
        before = len(self.pruner.rows) - len(self._rows(index))
        self.pruner.rows[before:] = sorted(self._rows(index), key=lambda row: place[row["name"]])
        late = self.ranks.exchange(walk.late)
        for row in self._rows(index):
            count = sum(tokens.get(row["name"], 0) for tokens in late)
            if count:
                row["notes"].append(f"{count} tokens came after it was pruned and are not in its sums")
        self._check(hidden, index)

    def _check(self, hidden: Activations, index: int) -> None:
        """Raise RunError when a block has put out something that is not finite."""
        for tensor in hidden:
            if not finite(tensor):
                raise RunError(
                    f"activations after block {index} are not finite: look for NaN or Inf in the input's weights, or "
                    "compute with --dtype float32"
                )

    def _solve(
        self, index: int, jobs: Sequence[Job], stored: Mapping[str, Tensor], computed: Mapping[str, Tensor]
    ) -> None:
        """Prune matrices, each on one of the ranks that hold its statistics in turn, and give all ranks the results."""
        rank, before = self.ranks.rank, len(self.pruner.rows)
        solvers = [holders[place % len(holders)] for place, (_, _, holders) in enumerate(jobs)]
        for (matrix, statistics, _), solver in zip(jobs, solvers, strict=True):
            if solver == rank:
                name = matrix.parameter
                self.pruner.solve(matrix, statistics, index, stored[name], computed[name].data)
        if self.ranks.world == 1:
            return
        told = self.ranks.exchange(self.pruner.rows[before:])
        rows = {row["name"]: row for part in told for row in part}
        self.pruner.rows[before:] = [rows[matrix.name] for matrix, _, _ in jobs]
        for (matrix, _, _), solver in zip(jobs, solvers, strict=True):
            view, result = matrix.view(stored[matrix.parameter]), matrix.view(computed[matrix.parameter].data)
            self.ranks.broadcast(view, solver)
            if solver != rank and result.data_ptr() != view.data_ptr():
                result.copy_(view)

    def _replay(
        self,
        index: int,
        calls: list[Call],
        hidden: Activations | None,
        dense: Activations | None,
        entries: Mapping[str, Entry] | None,
    ) -> None:
        """Move the hidden states through a block that an earlier run finished; the dense ones through the input's.

        entries: the finished block on the first rank, from which the others have it.
        """
        for stream, place in ((hidden, entries), (dense, None)):
            if stream is not None:
                self.parts.load_block(index, place)
                self.ranks.exchange(None)  # all have the block, or all end here
                if stream is hidden:
                    parameters = dict(self.parts.model.named_parameters())
                    for name in sorted({matrix.parameter for matrix in self.matrices[index]}):
                        self.ranks.broadcast(parameters[name].data, 0)
                self._walk(index, calls, stream, None, Needs.NOTHING).forward()
                self.parts.drop_block(index)

    def _walk(
        self, index: int, calls: list[Call], hidden: Activations, dense: Activations | None, needs: Needs
    ) -> Walk:
        blocks = self.parts.blocks
        return Walk(
            blocks.modules[index],
            blocks.prefix(index),
            self.matrices[index],
            calls,
            hidden,
            dense,
            needs,
            self.parts.device,
            self.recipe.experts == "all",
            self.ranks,
            self.experts_memory,
        )

    def _shard(self, index: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor | Entry]:
        """The block's tensors by disk key: pruned ones from memory, everything else straight from the input's files."""
        skeleton: Any = self.parts
        changed = {matrix.parameter for matrix in self.matrices[index]}
        tensors: dict[str, Tensor | Entry] = {}
        for group in skeleton.block_groups(index):
            if changed.intersection(group.targets):
                tensors.update(skeleton.names.unload(group, stored))
            else:
                tensors.update({key: skeleton.checkpoint.entries[key] for key, _ in group.sources})
        return tensors

    def _rows(self, index: int) -> list[dict[str, Any]]:
        return [row for row in self.pruner.rows if row["block"] == index]
