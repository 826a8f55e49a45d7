"""Memory of this process: what is resident, its peak, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

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


class FreedMemory:
    """Keeps resident memory from creeping up while equal work is done again and again.

    glibc keeps what was freed in pieces: a loop over blocks that holds nothing grew by 2.7 MB a block of 6.4 MB.
    Handing everything back each time would cost page faults, so that it is done when memory has grown by 3% only.
    """

    def __init__(self) -> None:
        self._least: int | None = None

    def give_back(self) -> None:
        """Call at the same point of every round."""
        now = resident_memory()
        if now is None or (self._least is not None and now <= _GROWTH * self._least):
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other allocators have none
        if trim is not None:
            trim(0)
        self._least = resident_memory()
