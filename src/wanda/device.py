"""Where to compute and in which type."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from wanda.errors import ConfigurationError, near

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(requested: str = "auto") -> torch.device:
    """The device called `requested`; "auto" is the first GPU when there is one, else the CPU.

    Raises ConfigurationError for a device that this machine (or this build of torch) has not.
    """
    if requested == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(requested)
        if device.type != "meta":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigurationError(
            f"device {requested!r} cannot be used here ({str(error).partition(chr(10))[0]}); "
            "choose cpu, or auto to take what there is"
        ) from error
    return device


def compute_dtype(device: torch.device, requested: str = "auto", stored: torch.dtype | None = None) -> torch.dtype:
    """The type to compute in: `requested` by name, or for "auto" what suits the device.

    auto: on a CPU bfloat16 where it has instructions for that (avx512_bf16, amx), else float32; on a GPU the
    type that the checkpoint is `stored` in, bfloat16 when it does not say. Raises ConfigurationError for an unknown
    name.
    """
    if requested != "auto":
        if requested not in DTYPES:
            raise ConfigurationError(f"unknown dtype {requested!r}: {near(requested, [*DTYPES, 'auto'])}")
        return DTYPES[requested]
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return stored if stored is not None and stored in DTYPES.values() else torch.bfloat16


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken where a block is computed; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")  # a container's own limit
    try:
        limit, used = ((group / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
        statistics = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = sum(int(line.split()[1]) for line in statistics if line.startswith(("active_file ", "inactive_file ")))
        found += [int(limit) - int(used) + cached] if limit != "max" else []  # files that were read can be dropped
    except OSError:
        pass
    return min(found, default=None)


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware: avx512_bf16 or amx (x86), bf16 (ARM)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:  # no Linux: float32 is always right
        return False
    flags = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
