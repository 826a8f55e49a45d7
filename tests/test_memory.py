"""Memory that is used again, and given back when it creeps up."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from wanda.checkpoint.tensors import SpareMemory, read_header, write_file
from wanda.memory import FreedMemory


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
