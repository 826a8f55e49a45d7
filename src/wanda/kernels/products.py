"""Products over tokens: out += a^T b, in float32, for Gram matrices and the sums of inherited errors."""

from __future__ import annotations

import torch
from torch import Tensor

from wanda.kernels.native import level, multiplies_bfloat16, native, pool

TOKENS = 1024  # laid out and multiplied at a time, so that the copies stay in the cache
PANEL = 128  # rows of a panel of the upper triangle, where torch multiplies


def add_product(out: Tensor, a: Tensor, b: Tensor, upper: bool = False) -> None:
    """Add a^T b to out [m, n] float32; a: [tokens, m], b: [tokens, n], of one type.

    upper: only the entries on and above the diagonal are wanted (m = n); those below hold anything afterwards. Half
        the work (BLAS calls it syrk, which torch does not offer).
    bfloat16 on a processor with VDPBF16PS or AMX is multiplied as it is, products exact and sums in float32, in an
    order that does not depend on the number of threads; everything else as float32 by torch.
    """
    native_bf16 = a.dtype == b.dtype == torch.bfloat16 and out.device.type == "cpu" and multiplies_bfloat16()
    for first, second in zip(a.split(TOKENS), b.split(TOKENS), strict=True):
        if native_bf16:
            _add_native(out, first, second, upper)
        else:
            _add(out, first.float(), second.float(), upper)


def _add(out: Tensor, a: Tensor, b: Tensor, upper: bool) -> None:
    m = out.shape[0]
    panel = PANEL if upper and out.device.type == "cpu" else m  # accelerators want one large product
    for start in range(0, m, panel):
        stop, left = min(start + panel, m), start if upper else 0
        out[start:stop, left:].addmm_(a[:, start:stop].T, b[:, left:])


def _add_native(out: Tensor, a: Tensor, b: Tensor, upper: bool) -> None:
    module = native()
    assert module is not None and out.dtype == torch.float32 and out.stride(1) == 1
    a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (a, b))
    places = (a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), out.data_ptr(), out.stride(0))
    module.add_token_product(len(a), *out.shape, *places, upper, level(), torch.get_num_threads(), pool())
