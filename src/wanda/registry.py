"""Registries of the axes: one file is one choice; its summary is the first line of the file's docstring."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from typing import Any, Generic, TypeVar

from wanda.errors import ConfigurationError, near

T = TypeVar("T")


class Registry(Generic[T]):
    """The choices of one axis: the modules of one package, imported when they are asked for.

    Listing names and summaries imports nothing, so that `--help` stays fast. A module registers its object
    with the decorator `register`; `admm_iterative.py` is the choice `admm-iterative`.
    """

    def __init__(self, kind: str, package: str, path: list[str]):
        self.kind = kind
        self.package = package
        self.path = path  # the package's own __path__, so that files added to it later are seen
        self._objects: dict[str, Any] = {}

    def register(self, thing: Any) -> Any:
        """Decorator: make an instance of the class `thing` the choice that its module is named after."""
        name = thing.__module__.rpartition(".")[2].replace("_", "-")
        thing.name = name
        self._objects[name] = thing()
        return thing

    def names(self) -> list[str]:
        """All choices, sorted; imports nothing."""
        modules = (module.name for module in pkgutil.iter_modules(self.path))
        return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        """The choice called `name`; raises ConfigurationError with the near names for an unknown one."""
        if name not in self._objects:
            if name not in self:
                raise ConfigurationError(f"unknown {self.kind} {name!r}: {near(name, self.names())}")
            importlib.import_module(f"{self.package}.{name.replace('-', '_')}")
        return self._objects[name]

    def summary(self, name: str) -> str:
        """First line of the docstring of the choice's file: what it is and its paper; imports nothing."""
        for folder in self.path:
            file = Path(folder) / f"{name.replace('-', '_')}.py"
            if file.exists():
                text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
                return text.partition("\n")[0].rstrip(".")
        raise ConfigurationError(f"unknown {self.kind} {name!r}: {near(name, self.names())}")
