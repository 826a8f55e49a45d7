"""A model without its weights, on the meta device, whose parts are filled from a checkpoint and emptied again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanda.blocks import Blocks, find_blocks
from wanda.checkpoint.names import Group, NameMap
from wanda.checkpoint.reader import Checkpoint
from wanda.checkpoint.source import NO_HEAD, classifies_images, load_config
from wanda.checkpoint.tensors import Entry, SpareMemory
from wanda.errors import ConfigurationError, RunError


class Skeleton:
    """The model of a checkpoint on the meta device, in the compute type; blocks come and go.

    model: a transformers causal language model or image classifier.
    blocks: its blocks.
    names: the map between its parameters and the checkpoint's tensors.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
    ):
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.model = build(checkpoint.folder, dtype, trust_remote_code)
        self.blocks: Blocks = find_blocks(self.model)
        self.names = NameMap.of(self.model, checkpoint.entries)
        if self.blocks.chain is not None:
            lacking = [name for name, _ in self.model.named_parameters() if name not in self.names.groups]
            if lacking:
                raise ConfigurationError(f"{checkpoint.folder} lacks {lacking[0]}: {NO_HEAD}")
        self._memory = SpareMemory()  # of dropped blocks
        self._keep_fp32 = tuple(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())

    def block_names(self, index: int) -> list[str]:
        """Names of block `index`'s parameters and persistent buffers, in the model."""
        prefix = self.blocks.prefix(index)
        return [prefix + name for name in self.blocks.modules[index].state_dict()]

    def block_groups(self, index: int) -> list[Group]:
        """The groups of tensors that make up block `index`; raises RunError when the checkpoint lacks one."""
        groups: dict[int, Group] = {}
        for name in self.block_names(index):
            if name not in self.names.groups:
                raise RunError(f"{self.checkpoint.folder} lacks {name}; the checkpoint does not fit its config")
            groups[id(self.names.groups[name])] = self.names.groups[name]
        return list(groups.values())

    def block_keys(self, index: int) -> list[str]:
        """Keys on disk of block `index`."""
        return [key for group in self.block_groups(index) for key, _ in group.sources]

    def load_block(self, index: int, entries: Mapping[str, Entry] | None = None) -> dict[str, Tensor]:
        """Fill block `index`; returns its parameters as stored, by name.

        entries: where its tensors lie, by disk key, when not in the checkpoint itself. Where stored and compute type
        agree, the returned tensors are the model's own, so that writing to them changes the model. They are valid
        until the block is dropped: the next one is read into their memory.
        """
        stored: dict[str, Tensor] = {}
        for group in self.block_groups(index):
            stored.update(self.names.load(group, entries, self._memory))
        if index + 1 < len(self.blocks):
            for key in self.block_keys(index + 1):
                self.checkpoint.entries[key].read_ahead()
        self._fill(stored, self.blocks.modules[index], self.blocks.prefix(index))
        return stored

    def drop_block(self, index: int) -> None:
        """Empty block `index`: back to the meta device."""
        self.blocks.modules[index].to("meta")
        self._memory.take_back()
        if index + 1 == len(self.blocks):
            self._memory.give_up()

    def load_outside(self, head: bool = False) -> None:
        """Fill everything outside the blocks (embeddings, final norm, rotary tables), the output head only on demand.

        Raises RunError when the checkpoint lacks a parameter that is neither tied nor the head's.
        """
        inside = tuple(self.blocks.prefix(i) for i in range(len(self.blocks)))
        skipped: set[int] = set()
        if self.blocks.chain is None and not head and (output := self.model.get_output_embeddings()) is not None:
            skipped = {id(p) for p in output.parameters()}
            skipped -= {id(p) for p in self.model.get_input_embeddings().parameters()}
        tied = set(getattr(self.model, "all_tied_weights_keys", {}) or {})
        stored: dict[str, Tensor] = {}
        wanted = dict(self.model.named_parameters(remove_duplicate=False)) | self._persistent_buffers()
        for name, tensor in wanted.items():
            if name.startswith(inside) or id(tensor) in skipped or name in stored:
                continue
            group = self.names.groups.get(name)
            if group is not None:
                stored.update({k: v for k, v in self.names.load(group).items() if not k.startswith(inside)})
            elif name not in tied:
                raise RunError(f"{self.checkpoint.folder} lacks {name}; the checkpoint does not fit its config")
        self._fill(stored, self.model, "", skip=inside)
        if tied:
            self.model.tie_weights()

    def drop_outside(self) -> None:
        """Empty everything outside the blocks."""
        inside = {id(m) for block in self.blocks.modules for m in block.modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None and not tensor.is_meta:
                            empty: Any = tensor.to("meta")
                            tensors[name] = (
                                nn.Parameter(empty, requires_grad=False) if tensors is module._parameters else empty
                            )

    def _persistent_buffers(self) -> dict[str, Tensor]:
        state = self.model.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.model.named_buffers() if name in state}

    def _fill(self, stored: dict[str, Tensor], root: nn.Module, prefix: str, skip: tuple[str, ...] = ()) -> None:
        for name, tensor in stored.items():
            owner, leaf = self._owner(name)
            like = owner._parameters.get(leaf) if leaf in owner._parameters else owner._buffers[leaf]
            assert like is not None
            dtype = like.dtype if tensor.is_floating_point() and not self._stays_fp32(name) else tensor.dtype
            value = tensor.to(device=self.device, dtype=dtype)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
                owner._parameters[leaf]._is_hf_initialized = True  # type: ignore[union-attr]
            else:
                value._is_hf_initialized = True  # type: ignore[attr-defined]
                owner._buffers[leaf] = value
        self._initialise_buffers(root, prefix, skip)

    def _stays_fp32(self, name: str) -> bool:
        return any(part in name.split(".") for part in self._keep_fp32)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    @torch.no_grad()
    def _initialise_buffers(self, root: nn.Module, prefix: str, skip: Iterable[str]) -> None:
        """Non-persistent buffers (rotary tables, embedding scales) lie in no checkpoint: the model computes them."""
        from transformers import PreTrainedModel, initialization

        skip = tuple(skip)
        owners: dict[str, Any] = {}
        for name, module in root.named_modules():
            full = (prefix + name).rstrip(".")
            if skip and (full + ".").startswith(skip):
                continue
            missing = [b for b in module._non_persistent_buffers_set if module._buffers.get(b) is not None]
            if not missing:
                continue
            for buffer in missing:
                like = module._buffers[buffer]
                assert like is not None
                value = torch.empty_like(like, device=self.device)
                module._buffers[buffer] = value.fill_(_unset(value))
            owners = owners or {n: m for n, m in self.model.named_modules() if isinstance(m, PreTrainedModel)}
            inner = max((n for n in owners if n == "" or full == n or full.startswith(n + ".")), key=len)
            with initialization.guard_torch_init_functions():
                owners[inner]._init_weights(module)
            for buffer in missing:
                value = module._buffers[buffer]
                unset = _unset(value) if value is not None else 0
                if value is not None and unset and bool((value.isnan() if unset != unset else value == unset).any()):
                    raise RunError(
                        f"{full}.{buffer} lies in no checkpoint and the model does not compute it; it cannot be walked"
                    )


def _unset(like: Tensor) -> float:
    """What no buffer of this type holds once it is computed; 0, which tells nothing, for bool."""
    if like.dtype == torch.bool:
        return 0
    return torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).min


def build(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The causal language model, or image classifier, of a folder's config on the meta device, in evaluation mode.

    Raises ConfigurationError when transformers knows neither for the config.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    config = load_config(folder, trust_remote_code)
    images = classifies_images(config)
    options: dict[str, Any] = {} if images else {"experts_implementation": "eager"}
    try:
        with torch.device("meta"):
            auto_class = AutoModelForImageClassification if images else AutoModelForCausalLM
            model = auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    except (ValueError, KeyError, OSError, ImportError) as error:
        kind = "image classifier" if images else "causal language model"
        raise ConfigurationError(f"{folder} is no {kind} that transformers can build: {error}") from error
    return model.eval().requires_grad_(False)
