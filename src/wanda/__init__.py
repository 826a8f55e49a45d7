"""Wanda: makes pretrained models smaller and faster without retraining. The public functions are imported lazily."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__path__ = pkgutil.extend_path(__path__, __name__)
__version__ = "0.1.0"

_PUBLIC = {
    "Recipe": "wanda.recipe",
    "compare": "wanda.evaluation.compare",
    "load": "wanda.runtime.loading",
    "perplexity": "wanda.evaluation.perplexity",
    "prune": "wanda.pipeline",
    "prune_model": "wanda.pipeline",
    "WandaError": "wanda.errors",
}
_MODULES = ("calibration",)  # wanda.calibration.token_ids(...)
__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"wanda.{name}")
    raise AttributeError(f"module 'wanda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
