"""Loading whatever can be measured: ordinary checkpoints and packed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wanda.checkpoint.packed import is_packed
from wanda.checkpoint.source import load_model
from wanda.errors import ConfigurationError


def check(folder: Path, dtype: str = "auto", device: str = "auto") -> None:
    """Refuse, with a ConfigurationError, a packed folder in a type or place that it cannot run in."""
    if not is_packed(folder):
        return
    from wanda.runtime.loading import computed_dtype

    faults = []
    if device not in ("auto", "cpu"):
        faults.append(f"{folder} is packed: it runs on the CPU; leave --device away, or unpack it first: wanda unpack")
    try:
        computed_dtype(folder, dtype)
    except ConfigurationError as error:
        faults += error.faults
    if faults:
        raise ConfigurationError(faults)


def load(folder: Path, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False) -> Any:
    """The causal language model of a resolved folder, in eval mode; a packed one stays packed and runs on our kernels.

    Raises ConfigurationError when it cannot be loaded, or not in this type or place.
    """
    check(folder, dtype, device)
    if not is_packed(folder):
        return load_model(folder, dtype, device, trust_remote_code)
    from wanda.runtime.loading import load as load_packed

    return load_packed(folder, trust_remote_code=trust_remote_code, dtype=dtype)
