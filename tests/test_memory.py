"""Memory that is used again, and given back when it creeps up."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import tiny
from wanda.checkpoint.skeleton import Skeleton
from wanda.checkpoint.tensors import SpareMemory, read_header, write_file
from wanda.memory import FreedMemory
from wanda.pipeline import prune


def test_freed_memory_is_given_back_when_it_has_grown_over_a_usual_round(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1000, 1020, 1029, 1031, 900, 920, 928]
    seen: list[int] = []
    trimmed: list[int] = []

    def resident() -> int:
        seen.append(sizes[len(seen)])
        return seen[-1]

    class Libc:
        def malloc_trim(self, pad: int) -> None:
            trimmed.append(seen[-1])

    monkeypatch.setattr("wanda.memory.resident_memory", resident)
    monkeypatch.setattr("wanda.memory.ctypes.CDLL", lambda name: Libc())
    freed = FreedMemory()
    for _ in sizes:
        freed.give_back()
    assert trimmed == [1031, 928]  # 3% above the first round; then above 900, the first round after that


def test_a_block_is_read_into_the_memory_of_the_one_before(tmp_path: Path) -> None:
    one, two = torch.arange(12.0).reshape(3, 4), torch.arange(12.0, 24.0).reshape(3, 4)
    other = torch.ones(5, dtype=torch.int32)
    write_file(tmp_path / "t.safetensors", {"one": one, "two": two, "other": other}, {})
    entries, _ = read_header(tmp_path / "t.safetensors")
    memory = SpareMemory()
    first, beside = entries["one"].read(memory), entries["other"].read(memory)
    assert torch.equal(first, one) and torch.equal(entries["two"].read(memory), two)
    assert torch.equal(first, one)  # what is lent is nobody else's
    memory.take_back()
    again = entries["two"].read(memory)
    assert torch.equal(again, two) and again.data_ptr() == first.data_ptr()
    assert torch.equal(beside, other)
    memory.take_back()
    kept = weakref.ref(first)
    del first, beside, again
    assert kept() is not None  # free, to be lent
    memory.lend((7,), torch.float32)  # a block of other shapes: what is free does not stay beside it
    assert kept() is None
    first = entries["one"].read(memory)
    memory.give_up()
    assert entries["one"].read(memory).data_ptr() != first.data_ptr()


def test_experts_of_one_block_are_gone_before_those_of_the_next_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are fused from many tensors when they are read, into memory that no other block is read into."""
    tiny("mixtral").save_pretrained(tmp_path / "model")
    load, seen = Skeleton.load_block, []
    alive: list[weakref.ref[torch.Tensor]] = []

    def watched(self: Skeleton, index: int, entries: Any = None) -> dict[str, torch.Tensor]:
        assert not [ref for ref in alive if ref() is not None]
        stored = load(self, index, entries)
        alive[:] = [weakref.ref(tensor) for name, tensor in stored.items() if "experts" in name]
        seen.append(len(alive))
        return stored

    monkeypatch.setattr(Skeleton, "load_block", watched)
    prune(tmp_path / "model", out=tmp_path / "out", method="magnitude", sparsity=0.5, dtype="float32", progress=False)
    assert len(seen) >= 2 and min(seen) >= 2
