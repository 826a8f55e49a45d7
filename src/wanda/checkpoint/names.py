"""Names on disk are not names in memory: which tensors of the files make up which parameters, and back.

transformers keeps the conversions (Mixtral's experts lie one by one on disk and fused in memory; GPT-2's files lack a
prefix); this module asks it, one group of tensors at a time, so that no more than a block is ever in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from wanda.checkpoint.tensors import Entry, SpareMemory
from wanda.errors import RunError


@dataclass
class Group:
    """Tensors of the files that become parameters together.

    sources: (disk key, pattern of the converter, or the key itself when it is only renamed).
    targets: names in memory.
    """

    first: str
    sources: list[tuple[str, str]]
    converter: Any = None
    targets: tuple[str, ...] = ()


@dataclass
class NameMap:
    """The two-way map between the tensors of a checkpoint and the parameters and buffers of a model."""

    entries: Mapping[str, Entry]
    groups: dict[str, Group] = field(default_factory=dict)  # by each name in memory
    unused: list[str] = field(default_factory=list)  # disk keys that no parameter takes
    _model: Any = None
    _renamings: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, entries: Mapping[str, Entry]) -> NameMap:
        """Ask transformers' conversion mapping about every key; model: may be on the meta device.

        Raises RunError when a conversion cannot be followed.
        """
        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        state = model.state_dict()
        prefix = model.base_model_prefix
        self = cls(entries, _model=model, _renamings=renamings)
        found: dict[str, Group] = {}
        for key in sorted(entries, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, state)  # type: ignore[arg-type]
            if target not in state and key in state:
                target, pattern = key, None
            if target not in state:
                self.unused.append(key)
                continue
            group = found.setdefault(target, Group(target, [], by_pattern[pattern] if pattern else None))
            group.sources.append((key, pattern or key))
        for group in found.values():
            group.targets = self._targets(group, state)
            for target in group.targets:
                self.groups[target] = group
        return self

    def load(
        self, group: Group, entries: Mapping[str, Entry] | None = None, memory: SpareMemory | None = None
    ) -> dict[str, Tensor]:
        """The group's parameters as they are on disk (stored type), by name in memory.

        entries: of other files. memory: to read into, but for what is converted, which has memory of its own.
        """
        entries = self.entries if entries is None else entries
        memory = memory if group.converter is None else None
        return self._convert(group, {key: entries[key].read(memory) for key, _ in group.sources})

    def unload(self, group: Group, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `load`: tensors by disk key; raises RunError when the conversion cannot be inverted."""
        if group.converter is None:
            return {group.sources[0][0]: parameters[group.first]}
        reverse = group.converter.reverse_transform()
        for name in group.targets:
            renamed, pattern = reverse.rename_source_key(name)
            if pattern is None:
                raise RunError(f"{name}: its conversion cannot be undone; leave it out with --exclude")
            reverse.add_tensor(renamed, name, pattern, parameters[name])
        first, _ = reverse.rename_source_key(group.targets[0])
        converted = {
            k: v[0] if isinstance(v, list) else v for k, v in reverse.convert(first, **self._context()).items()
        }
        by_name = {self._middle(key): key for key, _ in group.sources}
        result = {}
        for name, tensor in converted.items():
            key = by_name.get(name) or next(
                (k for m, k in by_name.items() if m.endswith(name) or name.endswith(m)), None
            )
            if key is None or tuple(tensor.shape) != self.entries[key].shape:
                raise RunError(f"{group.first}: its conversion cannot be undone at {name}; leave it out with --exclude")
            result[key] = tensor.contiguous()
        if len(result) != len(group.sources):
            raise RunError(f"{group.first}: its conversion loses tensors on the way back; leave it out with --exclude")
        return result

    def _middle(self, key: str) -> str:
        return apply_renamings(key, self._renamings)

    def _context(self) -> dict[str, Any]:
        return {"model": self._model, "config": self._model.config}

    def _convert(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            return {group.first: tensors[group.sources[0][0]]}
        converter = deepcopy(group.converter)
        for key, pattern in group.sources:
            converter.add_tensor(group.first, key, pattern, tensors[key])
        converted = converter.convert(group.first, **self._context())
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def _targets(self, group: Group, state: Mapping[str, Tensor]) -> tuple[str, ...]:
        if group.converter is None:
            return (group.first,)
        empty = {
            key: torch.empty(self.entries[key].shape, dtype=self.entries[key].dtype, device="meta")
            for key, _ in group.sources
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in self._convert(group, empty).items()}
        wrong = [name for name, shape in shapes.items() if name not in state or tuple(state[name].shape) != shape]
        if wrong:
            raise RunError(
                f"{wrong[0]}: the checkpoint's tensors do not give its shape; the config does not fit the files"
            )
        return tuple(shapes)
