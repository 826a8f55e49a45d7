"""One block, all micro-batches: gather the statistics of its matrices, have them pruned, move the hidden states on.

Three ways (docs/design.md): `block` passes twice, once dense for the statistics and once pruned for the next block;
`none` passes once with dense weights and prunes then;
`layer` passes once: every micro-batch runs in a greenlet of its own that waits before each matrix until all
micro-batches have brought their input, the matrix is pruned, and the product runs with the pruned weights.

A Gram matrix for every expert of a block may be more than memory holds: `layer` makes each when its inputs are all
there, and gives it back before the next; `block` passes once for every group of experts that fits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from wanda.activations import Activations
from wanda.blocks import Call, refuse_changed_arguments
from wanda.errors import RunError
from wanda.parallel import Ranks
from wanda.statistics import Needs, Statistics
from wanda.taps import Hit, Taps
from wanda.weights import Matrix

Job = tuple[Matrix, Statistics | None, Sequence[int]]  # a matrix, its statistics, the ranks that hold those
Brought = tuple[Matrix, Tensor, Tensor | None]  # a matrix, its input, the dense model's input there
Solve = Callable[[Sequence[Job]], None]  # prunes matrices in place once their statistics are complete


def expert_memory(matrix: Matrix, needs: Needs) -> int:
    """Bytes of an expert's Gram matrix and the factor made of it; 0 for other matrices, and without Gram matrices."""
    return 2 * Statistics.memory(matrix.width, needs) if matrix.expert is not None and needs >= Needs.GRAM else 0


def groups_of(matrices: Sequence[Matrix], needs: Needs, memory: int | None) -> list[set[str]]:
    """Names of matrices, in their order, in groups whose experts' Gram matrices take `memory` bytes; at least one."""
    groups: list[set[str]] = [set()]
    taken = 0
    for matrix in matrices:
        cost = expert_memory(matrix, needs)
        if taken and cost and memory is not None and taken + cost > memory:
            groups.append(set())
            taken = 0
        groups[-1].add(matrix.name)
        taken += cost
    return groups


class _Enough(Exception):
    """The pass has seen the input of the block's last matrix; what follows would not be used."""


@dataclass
class Walk:
    """A block with what flows through it.

    block, prefix: the module and its name in the model with the final dot.
    matrices: to be pruned, in the order of the block's modules.
    calls: the block's arguments, one Call a micro-batch.
    hidden: hidden states that enter; replaced by those that leave.
    dense: hidden states of the dense model, kept beside when inherited errors are to be repaired; else None.
    needs: what the statistics must hold.
    all_experts: show every token to every expert first, for the statistics alone.
    experts_memory: bytes that the Gram matrices of experts, with their factors, may take at once; None: any number.
    ranks: the processes that the micro-batches are split over; statistics are added up before they are used.
    """

    block: nn.Module
    prefix: str
    matrices: Sequence[Matrix]
    calls: Sequence[Call]
    hidden: Activations
    dense: Activations | None = None
    needs: Needs = Needs.NORMS
    device: torch.device | str = "cpu"
    all_experts: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    experts_memory: int | None = None
    late: dict[str, int] = field(default_factory=dict)  # tokens that came after their matrix was pruned

    def __post_init__(self) -> None:
        self._parameters = {self.prefix + n: p for n, p in self.block.named_parameters()}
        self._matrix = {matrix.name: matrix for matrix in self._in_order()}
        self._rank = {name: rank for rank, name in enumerate(self._matrix)}
        self._last: dict[int, tuple[Tensor, int, Statistics]] = {}  # micro-batch -> its last input
        self._inputs: dict[str, Statistics] = {}  # matrix -> its input's
        self._current = 0  # the micro-batch that runs, where it has no greenlet of its own
        self._showing: set[tuple[int, bool]] = set()  # who is showing all tokens to all experts
        self._wanted: Collection[str] = self._matrix  # the matrices that are gathered now

    def forward(self) -> None:
        """Move the hidden states through the block as it is."""
        for index, call in enumerate(self.calls):
            self.hidden[index] = call.run(self.block, self.hidden[index].to(self.device))

    def gather(
        self, wanted: Collection[str] | None = None, again: bool = False, leaving: Activations | None = None
    ) -> list[Matrix]:
        """Gather the statistics of all matrices in a dense pass; returns those matrices whose input was seen, in order.

        The dense stream, when there is one, moves on; the hidden states stay. Passes after the first stop at the input
        of the last matrix.
        wanted: only these. again: the block was passed before, and the dense stream moved on. leaving: gets what leaves
        the block, so that no pass stops; `hidden` itself where nothing passes again.
        """
        order: list[str] = []
        stop = leaving is None and all(matrix.expert is None for matrix in self.matrices)
        current = last = 0
        beside: dict[str, list[Tensor]] = {}
        self._wanted = self._matrix if wanted is None else wanted

        def on_product(hits: list[Hit], compute: Callable[[], Any]) -> Any:
            nonlocal last
            for matrix, x in hits:
                if self._counts(matrix):
                    if current == 0:
                        order.append(matrix.name)
                    self._observe(current, matrix, x, _next(beside, matrix))
                    last += [matrix.name] == order[-1:]  # a matrix may be multiplied more than once
            if stop and current > 0 and last == order.count(order[-1]):
                raise _Enough
            return compute()

        taps = Taps(self._parameters, self.matrices, on_product)
        for current, call in enumerate(self.calls):
            self._current, last = current, 0
            if self.dense is not None and not again:
                beside = self._dense_inputs(current)
            hidden = self.hidden[current].to(self.device)
            try:
                with taps, self._all_experts():
                    if current == 0 and not again:
                        output = refuse_changed_arguments(call, self.block, hidden, self.prefix.rstrip("."))
                    else:
                        output = call.run(self.block, hidden)
                if leaving is not None:
                    leaving[current] = output
            except _Enough:
                pass
            self._last.clear()  # or an input of every micro-batch stays in memory
        self._wanted = self._matrix
        self.ranks.reduce(self._inputs, self._empty)
        return [matrix for matrix in self._matrix.values() if matrix.name in self._inputs]

    @property
    def statistics(self) -> dict[str, Statistics]:
        """What was gathered, by matrix; matrices with the same input share theirs."""
        return dict(self._inputs)

    def prune_by_block(self, solve: Solve) -> None:
        """Gather, prune all matrices, pass again with the pruned weights.

        Experts in several groups (`experts_memory`) take a dense pass each, the last expert first: no product depends
        on a matrix that comes after it. The statistics of all other matrices, gathered in the first, wait till the end.
        """
        self._gather_and_prune(solve, False)
        self.forward()

    def prune_from_dense(self, solve: Solve) -> None:
        """Gather, move the hidden states on with the dense weights, prune: no statistics see what was pruned."""
        self._gather_and_prune(solve, True)

    def _gather_and_prune(self, solve: Solve, move: bool) -> None:
        """move: leave the hidden states as they come out of the dense block."""
        everyone = range(self.ranks.world)
        experts = [matrix for matrix in self._matrix.values() if matrix.expert is not None]
        first, *groups = groups_of(experts[::-1], self.needs, self.experts_memory)
        if groups:
            first, *groups = groups_of(self._as_they_run(experts)[::-1], self.needs, self.experts_memory)
        later = {name for group in groups for name in group}
        leaving = (self.hidden.copy() if later else self.hidden) if move else None
        found = self.gather(self._matrix.keys() - later if later else None, leaving=leaving)
        for group in [first, *groups] if later else []:
            if group is not first:
                self.gather(group, again=True)
            solve([(m, self._inputs.pop(m.name), everyone) for m in experts if m.name in group & self._inputs.keys()])
        solve([(matrix, self._inputs[matrix.name], everyone) for matrix in found if matrix.name in self._inputs])
        self._inputs.clear()
        if leaving is not None and leaving is not self.hidden:  # later passes took what entered
            for index in range(len(self.calls)):
                self.hidden[index] = leaving[index]
            leaving.close()

    def _as_they_run(self, experts: Sequence[Matrix]) -> list[Matrix]:
        """Experts in the order in which their modules run, as the first micro-batch shows it."""
        ran: dict[str, None] = {}

        def on_product(hits: list[Hit], compute: Callable[[], Any]) -> Any:
            ran.update(dict.fromkeys(_home(matrix) for matrix, _ in hits))
            return compute()

        if self.calls:
            with Taps(self._parameters, experts, on_product):
                self.calls[0].run(self.block, self.hidden[0].to(self.device))
        order: list[str] = next((told for told in self.ranks.exchange(list(ran)) if told), [])
        return sorted(experts, key=lambda m: order.index(_home(m)) if _home(m) in order else len(order))

    def prune_by_layer(self, solve: Solve) -> None:
        """Prune each matrix when all micro-batches have brought its input; one pass (two streams: one pass each).

        Gram matrices are made when all their inputs are there, so that only those of one turn are in memory.
        """
        hub = getcurrent()
        solved: set[str] = set()
        beside: list[dict[str, list[Tensor]]] = [{} for _ in self.calls]
        waiting: dict[int, list[Brought]] = {}
        at_arrival = self.needs < Needs.GRAM  # sums of squares are small, and taken while the input is in the cache

        def on_product(hits: list[Hit], compute: Callable[[], Any]) -> Any:
            me = getcurrent()
            index, dense = me.place  # type: ignore[attr-defined]
            if dense:
                output = compute()  # with the weights that are still dense
                for matrix, x in hits:
                    beside[index].setdefault(matrix.name, []).append(x)
                hub.switch()
                return output
            fresh: list[Brought] = []
            for matrix, x in hits:
                if not self._counts(matrix):
                    continue
                if matrix.name in solved:
                    self.late[matrix.name] = self.late.get(matrix.name, 0) + x.numel() // matrix.width
                else:
                    fresh.append((matrix, x, _next(beside[index], matrix)))
                    if at_arrival:
                        self._observe(index, *fresh[-1])
            if fresh:
                hub.switch(fresh)
            return compute()

        def run(index: int, dense: bool) -> None:
            stream = self.dense if dense else self.hidden
            assert stream is not None
            hidden = stream[index].to(self.device)
            with taps:  # off again whenever a greenlet is left: on_product is, and it is where they switch
                if index == 0:
                    output = refuse_changed_arguments(self.calls[0], self.block, hidden, self.prefix.rstrip("."))
                else:
                    output = self.calls[index].run(self.block, hidden)
            stream[index] = output

        def resume(runner: greenlet) -> list[Brought] | None:
            found = runner.switch(*runner.place) if not runner else runner.switch()  # type: ignore[attr-defined]
            return None if runner.dead else found

        def start(index: int, dense: bool) -> greenlet:
            runner = greenlet(run)
            runner.place = (index, dense)  # type: ignore[attr-defined]
            return runner

        runners = [start(index, False) for index in range(len(self.calls))]
        ahead: list[greenlet] = []
        if self.dense is not None and any(matrix.expert is not None for matrix in self.matrices):
            beside = [self._dense_inputs(index) for index in range(len(self.calls))]  # it routes its tokens otherwise
        elif self.dense is not None:
            ahead = [start(index, True) for index in range(len(self.calls))]
        moving = list(range(len(self.calls)))
        taps = Taps(self._parameters, self.matrices, on_product)
        with self._all_experts():
            try:
                while True:
                    for index in moving:
                        if ahead and not ahead[index].dead:
                            resume(ahead[index])
                        found = resume(runners[index])
                        if found is not None:
                            waiting[index] = found
                    turn = self._turn(waiting)
                    if turn is None:
                        break
                    moving = sorted(index for index, found in waiting.items() if found[0][0].name == turn)
                    brought = {index: waiting.pop(index) for index in moving}
                    for group in groups_of(self._together(brought), self.needs, self.experts_memory):
                        if not at_arrival:
                            self._observe_all(brought, group)
                        seen = {name: self._inputs.pop(name) for name in group if name in self._inputs}
                        holders = self.ranks.reduce(seen, self._empty)
                        names = sorted(holders, key=self._rank.__getitem__)
                        solve([(self._matrix[name], seen.get(name), holders[name]) for name in names])
                        solved.update(names)
                        seen.clear()
                    brought.clear()
            finally:  # unwind what still waits
                for runner in (*runners, *ahead):
                    if runner:
                        runner.throw(GreenletExit)
        self._last.clear()

    def _counts(self, matrix: Matrix) -> bool:
        """Whether what the matrix is multiplied with now belongs to its statistics."""
        if matrix.name not in self._wanted:
            return False
        return matrix.expert is None or not self.all_experts or self._place() in self._showing

    def _place(self) -> tuple[int, bool]:
        return getattr(getcurrent(), "place", (self._current, False))

    @contextlib.contextmanager
    def _all_experts(self) -> Iterator[None]:
        """With `all_experts`: before a fused experts module runs, run it once with every token sent to every expert."""

        def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = self._place()
            if place in self._showing or place[1]:
                return
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            chosen = next(v for v in bound.arguments.values() if isinstance(v, Tensor) and not v.is_floating_point())
            everyone = torch.arange(count[id(module)], device=chosen.device).expand(len(chosen), -1)
            for name, value in bound.arguments.items():  # [tokens, chosen]: numbers of experts, and their weights
                if isinstance(value, Tensor) and value.shape == chosen.shape:
                    bound.arguments[name] = (
                        everyone if value is chosen else torch.ones_like(everyone, dtype=value.dtype)
                    )
            self._showing.add(place)
            try:
                module.forward(*bound.args, **bound.kwargs)
            finally:
                self._showing.discard(place)

        count: dict[int, int] = {}
        handles = []
        if self.all_experts:
            for matrix in self.matrices:
                if matrix.expert is None:
                    continue
                module = self.block.get_submodule(matrix.parameter.removeprefix(self.prefix).rpartition(".")[0])
                if id(module) not in count:
                    handles.append(module.register_forward_pre_hook(show, with_kwargs=True))
                count[id(module)] = max(count.get(id(module), 0), matrix.expert + 1)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _together(self, brought: Mapping[int, list[Brought]]) -> list[Matrix]:
        """The matrices whose turn it is, on all ranks where Gram matrices are made group by group."""
        names = {matrix.name for found in brought.values() for matrix, _, _ in found}
        if self.needs >= Needs.GRAM:
            names = {name for told in self.ranks.exchange(sorted(names)) for name in told}
        return [self._matrix[name] for name in sorted(names, key=self._rank.__getitem__)]

    def _observe_all(self, brought: Mapping[int, list[Brought]], group: Collection[str]) -> None:
        """Add what all micro-batches brought for a group of matrices to their statistics."""
        found = [(i, *one) for i, several in brought.items() for one in several if one[0].name in group]
        if not any(self._shared(index, x) for index, _, x, _ in found):
            self._last.clear()  # gives the Gram matrices back that nothing will share any more
        for index, matrix, x, beside in found:
            self._observe(index, matrix, x, beside)

    def _turn(self, waiting: Mapping[int, list[Brought]]) -> str | None:
        """The first matrix, in order, that a micro-batch of any rank waits for: none can still arrive there."""
        mine = min((self._rank[found[0][0].name] for found in waiting.values()), default=None)
        ranks = [rank for rank in self.ranks.exchange(mine) if rank is not None]
        return list(self._rank)[min(ranks)] if ranks else None

    def _empty(self, name: str) -> Statistics:
        """The statistics of a matrix before it sees anything."""
        matrix = self._matrix[name]
        inherit = self.dense is not None and matrix.expert is None  # routing differs between the two streams
        return Statistics(matrix.width, self.needs, self.device, inherit=inherit, owner=name)

    def _observe(self, index: int, matrix: Matrix, x: Tensor, beside: Tensor | None) -> None:
        """Add the input x of micro-batch `index` to the matrix's statistics, once for all matrices that share it."""
        known = self._inputs.get(matrix.name)
        if self._shared(index, x):
            shared = self._last[index][2]
            if known is None:
                self._inputs[matrix.name] = shared
                return
            if known is shared:
                return
        elif known is not None and known.owner != matrix.name:
            raise RunError(f"{matrix.name} shares its input with {known.owner} in some micro-batches only")
        if known is None:
            known = self._inputs[matrix.name] = self._empty(matrix.name)
        if known.inherit and (beside is None or beside.shape != x.shape):
            known.forget_lag()  # the dense model sends other tokens here
        known.update(x, beside if known.inherit else None)
        self._last[index] = (x, x._version, known)  # holds x, so that its memory is not given to another input

    def _shared(self, index: int, x: Tensor) -> bool:
        """Whether x is the input that micro-batch `index` brought last, unchanged."""
        last = self._last.get(index)
        return (
            last is not None
            and last[0].data_ptr() == x.data_ptr()
            and last[0].shape == x.shape
            and last[0].stride() == x.stride()
            and last[1] == x._version
        )

    def _dense_inputs(self, index: int) -> dict[str, list[Tensor]]:
        """Move the dense stream's micro-batch `index` through the block; returns every matrix's inputs on the way.

        Those of fused experts are left out: they are of other tokens than the pruned stream's.
        """
        inputs: dict[str, list[Tensor]] = {}

        def on_product(hits: list[Hit], compute: Callable[[], Any]) -> Any:
            for matrix, x in hits:
                if matrix.expert is None:
                    inputs.setdefault(matrix.name, []).append(x)
            return compute()

        assert self.dense is not None
        with Taps(self._parameters, self.matrices, on_product):
            self.dense[index] = self.calls[index].run(self.block, self.dense[index].to(self.device))
        return inputs

    def _in_order(self) -> list[Matrix]:
        """Module order, but the matrices of one expert together: an expert runs all of its matrices before the next."""
        place = {matrix.name: index for index, matrix in enumerate(self.matrices)}
        first: dict[str, int] = {}  # the first matrix of each fused experts module
        for matrix in self.matrices:
            if matrix.expert is not None:
                first.setdefault(_home(matrix), place[matrix.name])

        def key(matrix: Matrix) -> tuple[int, int, int]:
            if matrix.expert is None:
                return place[matrix.name], 0, 0
            return first[_home(matrix)], matrix.expert, place[matrix.name]

        return sorted(self.matrices, key=key)


def _next(inputs: dict[str, list[Tensor]], matrix: Matrix) -> Tensor | None:
    """Take the next of a matrix's inputs, None when there is none."""
    waiting = inputs.get(matrix.name)
    return waiting.pop(0) if waiting else None


def _home(matrix: Matrix) -> str:
    """The module that holds a matrix of experts."""
    return matrix.parameter.rpartition(".")[0]
