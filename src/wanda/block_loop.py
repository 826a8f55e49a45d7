"""The loop over the blocks: record, share the sparsity out, then load, prune and write one block after the other."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wanda.activations import Activations
from wanda.allocation import ALLOCATIONS, Allocation, BlockMeasure, share_out
from wanda.blocks import Blocks, Call, record
from wanda.checkpoint.tensors import Entry, bytes_of
from wanda.checkpoint.writer import Writer
from wanda.composition import Composition, finite
from wanda.errors import RunError
from wanda.kernels.selection import clear_lost
from wanda.memory import FreedMemory, ran_out
from wanda.parallel import Ranks
from wanda.patterns import Pattern, Unstructured, Variant, exact
from wanda.plan import pattern_of
from wanda.recipe import Recipe
from wanda.report.progress import Progress
from wanda.shared import Shared
from wanda.statistics import Needs, Statistics
from wanda.walk import Job, Walk
from wanda.weights import Matrix


class Parts(Protocol):
    """A model whose blocks can be filled and emptied: a Skeleton, or a model that is in memory anyway."""

    model: Any
    blocks: Blocks
    device: torch.device

    def load_block(self, index: int, entries: Mapping[str, Entry] | None = None) -> dict[str, Tensor]: ...
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
        enough = max(1, self.recipe.expert_tokens)
        if matrix.expert is not None and composition.needs > Needs.NOTHING and tokens < enough:
            notes.append(f"saw {tokens} calibration tokens: pruned by magnitude per row")
            composition, statistics = Composition("magnitude"), None
            if isinstance(pattern, (Variant, Unstructured)):
                pattern = Unstructured(pattern.sparsity, "row", spread=pattern.spread)
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
        parts: Parts,
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
            if self.pruner.composition.needs == Needs.NOTHING:
                hidden = None  # the allocation alone looked at activations
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
        weights = [sum(m.numel for m in block if self.recipe.sparsity_for(m.name) is None) for block in self.matrices]
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
                walk.gather(leaving=stream)
            else:
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
