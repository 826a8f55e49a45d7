"""Several processes, one run: the samples are split over ranks, sums and solves are shared, the first rank writes.

Every rank does the same steps in the same order. They meet in `exchange` alone, which also carries a rank's error to
all others; sums and tensors follow it. Sums are taken in the order of the ranks, so that they do not depend on timing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from wanda.errors import ConfigurationError, RunError
from wanda.statistics import Statistics

PATIENCE = timedelta(hours=1)  # until a rank that neither answers nor closes its connections counts as lost
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
_FRAME = 1024  # bytes of a message's first part; longer ones need a second
_PIECE = 1 << 24  # elements that are added up at a time, so that the buffers stay small


class Ranks:
    """The processes of a run as one of them sees it; Ranks() is a run of one process, where nothing is shared.

    rank, world: number of this process, number of processes.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self._alone = False  # another rank is lost or has told its error: no more is to be said
        self._group: dist.ProcessGroup | None = None  # the one that moves tensors, where it is not the default group
        self._wire = torch.device("cpu")  # where that group's tensors lie

    @classmethod
    @contextlib.contextmanager
    def started(cls, patience: timedelta = PATIENCE) -> Iterator[Ranks]:
        """The ranks that torchrun's environment tells of, one process without it; ends them together.

        An error on one rank is raised on all of them, a rank that died as a RunError. Raises ConfigurationError when
        the environment is incomplete, RunError when the ranks do not find each other.
        """
        if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
            yield cls()
            return
        missing = [name for name in _VARIABLES if name not in os.environ]
        if missing:
            raise ConfigurationError(f"RANK is set but {', '.join(missing)} not: start with torchrun, or unset RANK")
        ranks = cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        _own_device()
        try:
            dist.init_process_group("gloo", timeout=patience)
        except RuntimeError as error:
            raise RunError(
                f"{ranks} cannot reach the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}"
            ) from error
        try:
            with ranks._until_terminated():
                try:
                    yield ranks
                except Exception as error:
                    ranks._tell(error)
                    raise
        finally:
            dist.destroy_process_group()

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    @property
    def neighbours(self) -> int:
        """Processes of the run on this machine, as torchrun tells; 1 where nothing does."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world > 1 else 1

    @property
    def leads(self) -> bool:
        """Whether this rank reads the journal, writes and shows progress."""
        return self.rank == 0

    def split(self, tokens: Tensor, batch: int) -> Tensor:
        """This rank's part of the samples [samples, seqlen], in whole micro-batches; may be empty."""
        batches = -(-len(tokens) // batch)
        start, stop = (batches * rank // self.world * batch for rank in (self.rank, self.rank + 1))
        return tokens[start:stop]

    def connect(self, device: torch.device) -> None:
        """Move tensors with nccl from now on where every rank has a GPU of its own; with gloo otherwise."""
        if self.world == 1:
            return
        place = [os.uname().nodename, str(torch.cuda.current_device())] if device.type == "cuda" else None
        places = self.exchange(place)
        if None not in places and len({tuple(p) for p in places}) == self.world and dist.is_nccl_available():
            self._group, self._wire = dist.new_group(backend="nccl"), torch.device("cuda")

    def exchange(self, value: Any) -> list[Any]:
        """The JSON values that the ranks bring, in their order.

        Raises RunError or ConfigurationError when one brings an error instead, RunError when one is lost.
        """
        if self.world == 1:
            return [value]
        told = self._messages({"value": value})
        for rank, message in enumerate(told):
            if "error" in message:
                self._alone = True
                kind = ConfigurationError if message["exit"] == ConfigurationError.exit_code else RunError
                raise kind(f"{self} ended with rank {rank}: {message['error']}")
        return [message["value"] for message in told]

    def first(self, value: Any) -> Any:
        """The first rank's JSON value."""
        return self.exchange(value if self.leads else None)[0]

    def in_turn(self, make: Callable[[], Any]) -> Any:
        """The value of make(), called on the first rank before it is on the others: caches are filled once."""
        if self.leads:
            made = make()
            self.exchange(None)
        else:
            self.exchange(None)
            made = make()
        return made

    def tokens(self, ids: Tensor | None) -> Tensor | None:
        """The first rank's token ids [samples, seqlen], int64, or images [samples, ...], float32."""
        told = self.first(None if ids is None else [list(ids.shape), ids.is_floating_point()])
        if told is None:
            return None
        if ids is None:
            ids = torch.empty(told[0], dtype=torch.float32 if told[1] else torch.int64)
        self.broadcast(ids, 0)
        return ids

    def sum(self, tensor: Tensor) -> None:
        """Add a contiguous tensor up over all ranks, in their order, in place; every rank adds a part of it."""
        if self.world == 1:
            return
        for piece in tensor.view(-1).split(_PIECE):
            share = -(-piece.numel() // self.world)
            mine = torch.zeros(self.world * share, dtype=piece.dtype, device=self._wire)
            mine[: piece.numel()] = piece
            parts = torch.empty_like(mine)
            self._wait(dist.all_to_all_single, parts, mine, group=self._group)
            total, *others = parts.split(share)
            for other in others:
                total += other
            self._wait(dist.all_gather, list(mine.split(share)), total, group=self._group)
            piece.copy_(mine[: piece.numel()])

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give every rank the bytes of rank `source`'s tensor of this shape and type, in place."""
        if self.world == 1:
            return
        flat = tensor.detach().to(self._wire).contiguous().view(-1)
        self._wait(dist.broadcast, flat.view(torch.uint8), source, group=self._group)
        if self.rank != source:
            tensor.copy_(flat.view(tensor.shape))

    def reduce(self, seen: dict[str, Statistics], make: Callable[[str], Statistics]) -> Mapping[str, Sequence[int]]:
        """Add up what the ranks saw; returns, for every matrix that a rank saw, the ranks that hold its sums now.

        seen: statistics by matrix. What other ranks saw is added to it, where that was not added up before.
        make: empty statistics for a matrix. Raises RunError when matrices share an input on some ranks only.
        """
        if self.world == 1:
            for statistics in seen.values():
                statistics.reduced = True
            return dict.fromkeys(seen, (0,))
        told = self.exchange([[n, s.owner, s.tokens, s.reduced, s.inherit] for n, s in seen.items()])
        unpaired = {owner for entries in told for _, owner, _, reduced, inherit in entries if not (reduced or inherit)}
        inputs: dict[str, tuple[str, bool]] = {}
        holders: dict[str, list[int]] = {}
        tokens: dict[str, dict[int, int]] = {}
        for rank, entries in enumerate(told):
            for name, owner, count, reduced, _ in entries:
                if inputs.setdefault(name, (owner, reduced)) != (owner, reduced):
                    raise RunError(f"{name} shares its input with {inputs[name][0]} on some ranks only")
                holders.setdefault(name, []).append(rank)
                tokens.setdefault(owner, {})[rank] = count
        mine = {statistics.owner: statistics for statistics in seen.values()}
        for owner in sorted({owner for owner, reduced in inputs.values() if not reduced}):
            if owner not in mine:
                mine[owner] = make(owner)
            statistics = mine[owner]
            if owner in unpaired:
                statistics.forget_lag()  # as on the rank that has none
            for tensor in statistics.tensors():
                self.sum(tensor)
            statistics.tokens = sum(tokens[owner].values())
            statistics.reduced = True
        for name, (owner, reduced) in inputs.items():
            if not reduced:
                seen[name] = mine[owner]
                holders[name] = list(range(self.world))
        return holders

    def _messages(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of all ranks; the first part of each tells its length."""
        text = json.dumps(message).encode()
        framed = torch.frombuffer(bytearray(len(text).to_bytes(8, "big") + text), dtype=torch.uint8)
        parts = self._gather(framed[:_FRAME], _FRAME)
        lengths = [8 + int.from_bytes(bytes(part[:8].tolist()), "big") for part in parts]
        if max(lengths) > _FRAME:
            rest = self._gather(framed[_FRAME:], max(lengths) - _FRAME)
            parts = [torch.cat(pair) for pair in zip(parts, rest, strict=True)]
        return [json.loads(bytes(p[8:n].numpy())) for p, n in zip(parts, lengths, strict=True)]

    def _gather(self, data: Tensor, size: int) -> list[Tensor]:
        padded = torch.zeros(size, dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        self._wait(dist.all_gather, parts, padded)
        return parts

    def _wait(self, begin: Callable[..., Any], *tensors: Any, **options: Any) -> None:
        """Begin an exchange of tensors and see it through, open to signals; raises RunError when a rank is lost."""
        pause = 1e-5
        try:
            work = begin(*tensors, async_op=True, **options)
            while not work.is_completed():
                time.sleep(pause)
                pause = min(1.5 * pause, 0.005)
            work.wait()
        except RuntimeError as error:
            self._alone = True
            raise RunError(
                f"{self} lost another rank, which was killed or cannot be reached ({str(error).partition('. ')[0]}); "
                "what is finished is kept: start all ranks again with --resume"
            ) from error

    def _tell(self, error: Exception) -> None:
        """Bring an error of this rank to the others, when they next meet."""
        if self._alone:
            return
        text = str(error) if str(error) else type(error).__name__
        with contextlib.suppress(RunError):  # the others ended already: this rank's error is the one to raise
            self._messages({"error": text, "exit": getattr(error, "exit_code", 1)})

    @contextlib.contextmanager
    def _until_terminated(self) -> Iterator[None]:
        """SIGTERM, which launchers send to the ranks that are left when one has died, becomes a RunError."""

        def stop(*_: object) -> NoReturn:
            self._alone = True
            raise RunError(
                f"{self} was told to stop (SIGTERM), as launchers do when another rank has died; what is finished is "
                "kept: start all ranks again with --resume"
            )

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _own_device() -> None:
    """Each process of a machine computes on another of its accelerators, in turn."""
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
