"""Compression of packed matrices for shipping: exponents and masks by zstd, signs and mantissas as they are.

The bits of a value are rotated left by one, so that its sign goes to the bottom and its highest byte holds the exponent
alone (bfloat16, float32): pruned weights use few exponents. The same split is that of DFloat11 (arXiv:2504.11651).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanda.errors import MissingExtraError

_LEVEL = 9
_WORDS: dict[int, Any] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def require_zstd() -> ModuleType:
    """The zstandard package; MissingExtraError with its install line when it is absent."""
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("a compressed packed checkpoint", "zstandard", "compress") from error
    return zstandard


def split_planes(mask: Tensor, values: Tensor) -> dict[str, Tensor]:
    """mask uint64 and values (2 or 4 bytes each) -> "mask" and "exponents" (zstd frames) and "rest", all uint8."""
    size = values.element_size()
    words = values.view(torch.uint8).numpy().view(_WORDS[size])
    rotated = (words << 1) | (words >> (8 * size - 1))
    planes = rotated.view(np.uint8).reshape(-1, size)
    return {
        "mask": _compress(mask.view(torch.uint8).numpy()),
        "exponents": _compress(np.ascontiguousarray(planes[:, -1])),
        "rest": torch.from_numpy(np.ascontiguousarray(planes[:, :-1]).reshape(-1)),
    }


def join_planes(parts: Mapping[str, Tensor], masks: int, values: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Undo `split_planes`: "mask" uint64 [masks] and "values" of dtype [values]; ValueError when sizes do not fit."""
    size = dtype.itemsize
    if any(parts[name].dtype != torch.uint8 for name in ("mask", "exponents", "rest")):
        raise ValueError("its compressed parts are no bytes")
    if parts["rest"].numel() != values * (size - 1):
        raise ValueError(f"its rest has {parts['rest'].numel()} bytes, not {values * (size - 1)}")
    planes = np.empty((values, size), dtype=np.uint8)
    planes[:, -1] = _decompress(parts["exponents"], values)
    planes[:, :-1] = parts["rest"].numpy().reshape(values, size - 1)
    rotated = planes.reshape(-1).view(_WORDS[size])
    words = (rotated >> 1) | (rotated << (8 * size - 1))
    return {
        "mask": torch.from_numpy(_decompress(parts["mask"], 8 * masks)).view(torch.uint64),
        "values": torch.from_numpy(words.view(np.uint8)).view(dtype),
    }


def _compress(data: np.ndarray) -> Tensor:
    frame = require_zstd().ZstdCompressor(level=_LEVEL).compress(data.data)
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def _decompress(frame: Tensor, size: int) -> np.ndarray:
    """`size` bytes, writable; ValueError for anything else."""
    zstandard = require_zstd()
    data = frame.contiguous().numpy().tobytes()
    try:
        # The size that the frame claims is allocated at once, so it must be the expected one.
        if zstandard.frame_content_size(data) != size:
            raise ValueError("a compressed part has another size")
        return np.frombuffer(bytearray(zstandard.ZstdDecompressor().decompress(data)), dtype=np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError("a compressed part is no whole zstd frame") from error
