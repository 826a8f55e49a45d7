"""Memory of this process: what is resident, its peak, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
_GROWTH = 1.03  # of resident memory, above which freed memory is given back


def resident_memory() -> int | None:
    """Resident bytes of this process now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """Peak resident bytes of this process: VmHWM, since getrusage counts what a parent held before exec."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reuse_memory() -> None:
    """Have this process use freed memory again instead of asking the system for fresh pages, each filled with zeros.

    glibc hands large pieces back at once; with this it keeps those below 32 MiB, its limit, until `give_back`.
    torch is told to ask for huge pages. For a process of our own, before torch allocates; what the environment says
    about either is left as it is. Elsewhere than with glibc only the second.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}.isdisjoint(os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, 32 << 20)
            mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's own, or torch's for a CPU or an accelerator."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def give_back() -> None:
    """Hand the memory that this process has freed back to the system, where glibc keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other allocators have none
    if trim is not None:
        trim(0)


class FreedMemory:
    """Keeps resident memory from creeping up while equal work is done again and again.

    glibc keeps what was freed in pieces: a loop over blocks that holds nothing grew by 2.7 MB a block of 6.4 MB.
    What is handed back is handed out again page by page, each filled with zeros, so that this is done only when memory
    has grown by 3% since the first round, or since the first one after it was handed back.
    """

    def __init__(self) -> None:
        self._usual: int | None = None

    def give_back(self) -> None:
        """Call at the same point of every round."""
        now = resident_memory()
        if now is None:
            return
        if self._usual is None:
            self._usual = now
        elif now > _GROWTH * self._usual:
            give_back()
            self._usual = None
