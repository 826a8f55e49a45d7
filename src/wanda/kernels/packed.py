"""Matrices stored as surviving values, a bit mask and row offsets, and products with them (docs/packed-format.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from wanda.errors import RunError
from wanda.kernels.native import LEVELS, level, native, pool

KINDS = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
}  # the types that can be packed, as packed.h numbers them
SLACK = 32  # values that may be read behind the last one
ALIGNMENT = 64  # bytes; every part is padded to it
MOST_SURVIVORS = 2**32 - 1  # what an offset can hold
COLUMNS = 16  # up to here the matrix-vector kernels run
_TILE = 1 << 21  # weights expanded at a time where torch multiplies
_BITS = {2: torch.int16, 4: torch.int32}


def words(width: int) -> int:
    """64-bit mask words of a row of `width` weights."""
    return -(-width // 64)


def _padded(count: int, itemsize: int) -> int:
    return -(-count * itemsize // ALIGNMENT) * ALIGNMENT // itemsize


def part_lengths(out: int, width: int, survivors: int, dtype: torch.dtype) -> dict[str, int]:
    """Elements of each part of a packed [out, width] matrix: mask (8 bytes each), offsets (4), values (of dtype)."""
    return {
        "mask": _padded(out * words(width), 8),
        "offsets": _padded(out + 1, 4),
        "values": _padded(survivors + SLACK, dtype.itemsize),
    }


def packed_size(out: int, width: int, survivors: int, dtype: torch.dtype) -> int:
    """Bytes of a packed [out, width] matrix."""
    parts = part_lengths(out, width, survivors, dtype)
    return 8 * parts["mask"] + 4 * parts["offsets"] + dtype.itemsize * parts["values"]


def count_survivors(dense: Tensor) -> int:
    """Weights whose bits are not all zero: -0.0 and NaN survive, so that packing loses nothing."""
    return int(torch.count_nonzero(dense.view(_BITS[dense.element_size()])))


@dataclass(frozen=True)
class PackedMatrix:
    """A sparse [out, width] matrix that stays packed in memory.

    mask: uint64 [>= out * words(width)]; bit j % 64 of word i * words(width) + j // 64 is set when (i, j) survives.
    offsets: uint32 [>= out + 1]; row i's values are values[offsets[i]:offsets[i + 1]], in the order of columns.
    values: bfloat16, float16 or float32 [>= survivors + SLACK].

    The kernels trust mask and offsets: `fault()` must have been None for parts that come from outside.
    """

    out: int
    width: int
    mask: Tensor
    offsets: Tensor
    values: Tensor

    @classmethod
    def pack(cls, dense: Tensor) -> PackedMatrix:
        """Pack a dense [out, width] matrix of bfloat16, float16 or float32, bit for bit."""
        out, width = dense.shape
        dense = dense.detach().cpu().contiguous()
        module, threads = native(), torch.get_num_threads()
        mask = np.zeros(_padded(out * words(width), 8), dtype="<u8")
        offsets = np.zeros(_padded(out + 1, 4), dtype="<u4")
        counts = np.empty(out, dtype="<u4")
        if module is not None:
            parts = (dense.data_ptr(), mask.ctypes.data, counts.ctypes.data)
            module.packed_mark(KINDS[dense.dtype], out, width, *parts, threads, pool())
        else:
            alive = (dense.view(_BITS[dense.element_size()]) != 0).numpy()
            alive.sum(axis=1, out=counts)
            rows = np.packbits(alive, axis=1, bitorder="little")
            mask.view(np.uint8)[: out * words(width) * 8].reshape(out, words(width) * 8)[:, : rows.shape[1]] = rows
        np.cumsum(counts, out=offsets[1 : out + 1])
        survivors = int(counts.sum(dtype=np.int64))
        values = torch.zeros(part_lengths(out, width, survivors, dense.dtype)["values"], dtype=dense.dtype)
        packed = cls(out, width, torch.from_numpy(mask), torch.from_numpy(offsets), values)
        if module is not None:
            module.packed_gather(*packed._description, dense.data_ptr(), threads, pool())
        else:
            bits = dense.view(_BITS[dense.element_size()])
            values.view(bits.dtype)[:survivors] = bits[torch.from_numpy(alive)]
        return packed

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.values.dtype

    @property
    def survivors(self) -> int:
        """Number of values: the last offset."""
        return int(self.offsets.view(torch.int32)[self.out]) & 0xFFFFFFFF

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, padding included."""
        return self.mask.nbytes + self.offsets.nbytes + self.values.nbytes

    @cached_property
    def _description(self) -> tuple[int, ...]:
        parts = (self.mask.data_ptr(), self.offsets.data_ptr(), self.values.data_ptr())
        return (KINDS[self.dtype], self.out, self.width, *parts)

    def fault(self, threads: int = 1) -> str | None:
        """What is wrong with the structure, in words; None when no kernel can read out of bounds."""
        lengths = part_lengths(self.out, self.width, 0, self.dtype)
        for name in ("mask", "offsets", "values"):
            part: Tensor = getattr(self, name)
            if part.numel() < lengths[name] or not part.is_contiguous():
                return f"its {name} are too short for {self.out} x {self.width} weights"
        module = native()
        if module is not None:
            bad = module.packed_check(*self._description, self.values.numel(), threads, pool())
        else:
            bad = self._first_bad_row()
        return None if bad < 0 else f"mask, offsets and number of values do not agree in row {bad}"

    def _first_bad_row(self) -> int:
        mask = self.mask.numpy()[: self.out * words(self.width)].reshape(self.out, words(self.width))
        offsets = self.offsets.numpy()[: self.out + 1].astype(np.int64)
        if offsets[0] != 0 or self.values.numel() < SLACK:
            return 0
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
        bad = np.diff(offsets) != bits.sum(axis=1, dtype=np.int64)
        bad |= offsets[1:] + SLACK > self.values.numel()
        bad |= bits[:, self.width :].any(axis=1)
        return int(bad.argmax()) if bad.any() else -1

    def dense(self, first: int = 0, last: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [first, last) as a dense [rows, width] tensor: bit for bit, or with dtype float32 as float32."""
        last = self.out if last is None else last
        dtype = dtype or self.dtype
        module = native()
        if module is not None:
            dense = torch.empty(last - first, self.width, dtype=dtype)
            parts = (first, last, KINDS[dtype], dense.data_ptr())
            module.packed_expand(*self._description, level(), torch.get_num_threads(), pool(), *parts)
            return dense
        dense = torch.empty(last - first, self.width, dtype=self.dtype)
        mask = self.mask.numpy()[first * words(self.width) : last * words(self.width)].reshape(
            last - first, words(self.width)
        )
        alive = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little", count=self.width).astype(bool)
        begin, end = (int(n) for n in self.offsets.numpy()[[first, last]])
        bits = dense.view(_BITS[dense.element_size()]).zero_()
        bits[torch.from_numpy(alive)] = self.values.view(bits.dtype)[begin:end]
        return dense.to(dtype)

    def dense_while_held(self, dtype: torch.dtype) -> Tensor:
        """`dense(dtype=dtype)`, the same tensor for as long as somebody holds it: tied layers save one."""
        held = self._held.get(dtype)
        if held is None:
            held = self._held[dtype] = self.dense(dtype=dtype)
        return held

    @cached_property
    def _held(self) -> WeakValueDictionary[torch.dtype, Tensor]:
        return WeakValueDictionary()

    def rows(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows by number, int64 of any shape, as dense [..., width]: what functional.embedding gives for `dense()`.

        Raises IndexError when there is no such row, RunError for indices that are not on the CPU.
        """
        if not indices.is_cpu:
            raise RunError(f"packed rows are on the CPU, their numbers on {indices.device}; unpack the checkpoint")
        unique, places = torch.unique(indices, return_inverse=True)
        if unique.numel() and not 0 <= int(unique[0]) <= int(unique[-1]) < self.out:
            raise IndexError(f"rows {int(unique[0])} to {int(unique[-1])} are asked of a matrix of {self.out}")
        chosen = [self.dense(row, row + 1, dtype) for row in unique.tolist()] or [self.dense(0, 0, dtype)]
        return torch.cat(chosen)[places]

    def _tiles(self) -> Iterator[tuple[int, int]]:
        step = max(1, _TILE // max(1, self.width))
        for first in range(0, self.out, step):
            yield first, min(self.out, first + step)

    @torch.no_grad()
    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., width] times the matrix's transpose, plus bias [out]: what functional.linear gives for `dense()`.

        x: of the matrix's type or float32, on the CPU; bias and result have its type. Sums are taken in float32.
        Raises RunError when x or bias is anything else.
        """
        if x.dtype not in (self.dtype, torch.float32) or x.shape[-1] != self.width or not x.is_cpu:
            raise RunError(
                f"a packed {self.dtype} layer of {self.width} inputs on the CPU cannot take {tuple(x.shape)} "
                f"of {x.dtype} on {x.device}; load the model where it is wanted, or unpack the checkpoint"
            )
        _check_bias(bias, x.dtype, self.out)
        columns = x.reshape(math.prod(x.shape[:-1]), self.width)
        if columns.stride(1) != 1:
            columns = columns.contiguous()
        module = native()
        if module is None or (columns.shape[0] > COLUMNS and not self._multiplies_many(module, x.dtype)):
            result = columns.new_empty(len(columns), self.out)
            for a, b in self._tiles():
                weight, part = self.dense(a, b, x.dtype), result[:, a:b]
                if bias is None:
                    torch.mm(columns, weight.T, out=part)
                else:
                    torch.addmm(bias[a:b], columns, weight.T, out=part)
        else:
            result = _multiply(self._description, columns, bias)
        return result.reshape(*x.shape[:-1], self.out)

    def _multiplies_many(self, module: ModuleType, computed: torch.dtype) -> bool:
        """Whether a kernel of our own takes more than COLUMNS columns, and is not slower than torch at that."""
        if tiled(self.dtype) and computed == self.dtype:
            return True
        return level() >= LEVELS.index("avx2") and bool(module.packed_skipping_pays(*self._description, level()))


def tiled(dtype: torch.dtype) -> bool:
    """Whether there is the tiled product of bfloat16: any number of columns, and dense matrices."""
    return dtype == torch.bfloat16 and native() is not None and level() >= LEVELS.index("avx512_bf16")


def _check_bias(bias: Tensor | None, dtype: torch.dtype, out: int) -> None:
    """RunError unless a kernel can add the bias, which it reads from its address."""
    if bias is not None and not (
        bias.is_cpu and bias.dtype == dtype and bias.is_contiguous() and tuple(bias.shape) == (out,)
    ):
        raise RunError(
            f"a layer of {out} outputs and inputs of {dtype} on the CPU cannot take a bias {tuple(bias.shape)} of "
            f"{bias.dtype} on {bias.device}; move the bias to where and what the inputs are, with one value an output"
        )


def _multiply(description: tuple[int, ...], columns: Tensor, bias: Tensor | None) -> Tensor:
    module = native()
    assert module is not None
    out = torch.empty(columns.shape[0], description[1], dtype=columns.dtype)
    module.packed_multiply(
        *description,
        level(),
        torch.get_num_threads(),
        pool(),
        KINDS[columns.dtype],
        columns.data_ptr(),
        columns.stride(0),
        columns.shape[0],
        out.data_ptr(),
        out.stride(0),
        0 if bias is None else bias.data_ptr(),
    )
    return out


def dense_multiply(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """functional.linear(x, weight, bias) by our own dense kernel, which there is where `tiled(weight.dtype)` holds.

    weight: contiguous [out, width] bfloat16 on the CPU; x: [..., width]. Raises RunError where there is none, and for a
    bias that it cannot add.
    """
    if not tiled(weight.dtype):
        raise RunError(f"there is no dense kernel for {weight.dtype} on this machine; use torch's product")
    out, width = weight.shape
    _check_bias(bias, weight.dtype, out)
    columns = x.reshape(math.prod(x.shape[:-1]), width)
    if columns.stride(1) != 1:
        columns = columns.contiguous()
    description = (KINDS[weight.dtype], out, width, 0, 0, weight.data_ptr())
    return _multiply(description, columns, bias).reshape(*x.shape[:-1], out)
