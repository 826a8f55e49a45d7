"""The compiled extension: whether it is there, which instruction set it may use, and the thread pool it shares."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from wanda.errors import ConfigurationError, near

VARIABLE = "WANDA_KERNELS"  # environment variable that forces a path, for tests and comparisons
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # in the order of level.h


@functools.cache
def native() -> ModuleType | None:
    """The extension module; None where it was not compiled, or with WANDA_KERNELS=torch. Says so once, on stderr.

    Raises ConfigurationError when WANDA_KERNELS names no path.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and wanted not in (*LEVELS, "torch"):
        raise ConfigurationError(f"{VARIABLE}={wanted} is no kernel path: {near(wanted, (*LEVELS, 'torch'))}")
    if wanted == "torch" or sys.byteorder != "little":
        return None
    try:
        return importlib.import_module("wanda.kernels._native")
    except ImportError as error:
        print(
            f"wanda: the C kernels are not there ({error}), so pruning takes longer, and packed layers run at dense "
            "speed and size; reinstall wanda-prune where there is a C compiler to have them (`pip install -v` shows "
            "what keeps one that is there from compiling them)",
            file=sys.stderr,
        )
        return None


@functools.cache
def level() -> int:
    """Index into LEVELS of the path to take: the best of this machine, or the one that WANDA_KERNELS names.

    Raises ConfigurationError when this machine cannot run the wanted one. The extension must be there.
    """
    module = native()
    assert module is not None
    best: int = module.best_level()
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return best
    if LEVELS.index(wanted) > best:
        raise ConfigurationError(f"{VARIABLE}={wanted}: this machine runs {LEVELS[best]} at most; choose that or less")
    return LEVELS.index(wanted)


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself (VDPBF16PS, TDPBF16PS), and may."""
    return native() is not None and level() >= LEVELS.index("avx512_bf16")


@functools.cache
def pool() -> int:
    """Address of GOMP_parallel in the OpenMP library that torch has loaded; 0 when there is none.

    Sharing torch's pool is what keeps two sets of threads from spinning against each other.
    """
    beside = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    for name in [*(str(file) for file in beside), "libgomp.so.1", None]:
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW if name else ctypes.DEFAULT_MODE)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0
