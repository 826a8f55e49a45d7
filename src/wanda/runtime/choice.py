"""Packed or dense, layer by layer: a small model of which is faster at decoding, from bench/layer_choice.py.

A packed product reads fewer bytes but places every value where it belongs, which costs time for each weight. So packing
gains where the bytes come from memory and the kernel is fast, and loses where a matrix lies in the cache or torch's own
product computes faster than our kernel expands. The numbers are of three machines (docs/runtime.md), taken so that
packing did not lose against torch as it is, nor against torch held to the instructions of the path. They are fixed, so
that two runs give the same text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wanda.kernels.native import LEVELS, level
from wanda.kernels.packed import MOST_SURVIVORS, PackedMatrix

LARGE = 4 << 20  # bytes as float32 from which a matrix without zeros is kept as it is stored
CACHE = 64 << 20  # bytes: matrices that take less of it together, dense, may lie in the last-level cache


@dataclass(frozen=True)
class Gain:
    """Where packing was measured to gain.

    density: the highest share of survivors. nbytes: the most bytes of the dense matrix. cached: also where all matrices
    together fit in the cache.
    """

    density: float
    nbytes: float = float("inf")
    cached: bool = False


HALF, THIRTY = 0.51, 0.31  # 50% and 70% sparsity as measured; rows of odd width keep a little more
GAINS: dict[tuple[str, torch.dtype, torch.dtype], tuple[Gain, ...]] = {
    ("avx512_bf16", torch.bfloat16, torch.bfloat16): (Gain(1.0, cached=True),),
    ("avx512_bf16", torch.float32, torch.float32): (Gain(HALF),),
    ("avx512_bf16", torch.bfloat16, torch.float32): (Gain(HALF),),
    ("avx512_bf16", torch.float16, torch.float32): (Gain(HALF),),
    ("amx", torch.bfloat16, torch.bfloat16): (Gain(1.0, cached=True),),
    ("amx", torch.float32, torch.float32): (Gain(HALF),),
    ("amx", torch.bfloat16, torch.float32): (Gain(HALF),),
    ("amx", torch.float16, torch.float32): (Gain(HALF),),
    ("amx", torch.float16, torch.float16): (Gain(HALF),),  # torch's product takes longer there than elsewhere
    ("avx512", torch.float32, torch.float32): (Gain(HALF),),
    ("avx512", torch.bfloat16, torch.float32): (Gain(HALF),),
    ("avx512", torch.float16, torch.float32): (Gain(HALF),),
    ("avx512", torch.bfloat16, torch.bfloat16): (Gain(HALF, nbytes=2 << 20),),  # above that torch's product is another
    ("avx2", torch.float32, torch.float32): (Gain(HALF, nbytes=4 << 20),),
    ("avx2", torch.bfloat16, torch.float32): (Gain(HALF),),
    ("avx2", torch.float16, torch.float32): (Gain(HALF),),
    ("avx2", torch.bfloat16, torch.bfloat16): (Gain(HALF),),
}  # path, stored type, type computed in; not portable, and seldom in float16, which is converted both ways


def gains(path: str, stored: torch.dtype, computed: torch.dtype, nbytes: int, density: float, together: int) -> bool:
    """Whether a packed matrix is predicted to decode faster than torch's dense one on a kernel path (LEVELS).

    stored: type of the packed values; computed: of activations, and of the dense matrix. nbytes: of the dense matrix;
    density: share of survivors; together: dense bytes of all matrices of the model.
    """
    return any(
        density <= gain.density and nbytes <= gain.nbytes and (gain.cached or together >= CACHE)
        for gain in GAINS.get((path, stored, computed), ())
    )


def kept_as_stored(
    tensors: Mapping[str, Tensor], matrices: Mapping[str, PackedMatrix], computed: torch.dtype | None, speed: bool
) -> set[str]:
    """Names of the dense matrices of two-byte values that stay so in a model that computes in float32.

    A matrix of which nothing was removed runs on the packed kernels as well: they take the same time whatever its
    density, and read little more than half of the bytes. tensors: what is not packed on the disk. speed: only where
    that is predicted to gain on this machine's kernel path; small ones stay ordinary anyway.
    """
    if computed != torch.float32:
        return set()
    large = {
        key: tensor
        for key, tensor in tensors.items()
        if tensor.ndim == 2
        and tensor.dtype in (torch.bfloat16, torch.float16)
        and LARGE <= 4 * tensor.numel() <= 4 * MOST_SURVIVORS
    }
    together = 4 * (sum(m.out * m.width for m in matrices.values()) + sum(tensor.numel() for tensor in large.values()))
    path = LEVELS[level()]
    return {
        key
        for key, tensor in large.items()
        if not speed or gains(path, tensor.dtype, computed, 4 * tensor.numel(), HALF, together)
    }


def without_gain(matrices: Mapping[str, PackedMatrix], dtype: torch.dtype | None = None) -> set[str]:
    """Names of the matrices for which packing is not predicted to gain speed on this machine's kernel path.

    dtype: what the model computes in, each matrix's own type when None.
    """
    sizes = {key: matrix.out * matrix.width for key, matrix in matrices.items()}
    types = {key: dtype or matrix.dtype for key, matrix in matrices.items()}
    nbytes = {key: size * types[key].itemsize for key, size in sizes.items()}
    together = sum(nbytes.values())
    path = LEVELS[level()]
    return {
        key
        for key, matrix in matrices.items()
        if not gains(path, matrix.dtype, types[key], nbytes[key], matrix.survivors / sizes[key], together)
    }
