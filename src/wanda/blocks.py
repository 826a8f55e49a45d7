"""The decoder blocks of a model: finding them, and recording the arguments each is called with.

No code here knows an architecture. Blocks are the outermost ModuleList as long as the config says; every block's own
arguments (masks, position embeddings) are noted by a stand-in, since sliding-window and hybrid models give different
ones to different blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wanda.errors import RunError


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model: name of their list in the model, and the list itself."""

    name: str
    modules: nn.ModuleList

    def __len__(self) -> int:
        return len(self.modules)

    def prefix(self, index: int) -> str:
        """What the names of block `index`'s parameters begin with."""
        return f"{self.name}.{index}."


def find_blocks(model: nn.Module) -> Blocks:
    """The outermost ModuleList whose length is the config's num_hidden_layers.

    Raises RunError when there is none, or when blocks share parameters (pruning one would change another).
    """
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    kind = type(model).__name__
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise RunError(f"{kind} has no list of {count} blocks to walk; it is not a decoder that can be pruned")
    name, modules = min(found, key=lambda item: item[0].count("."))
    owner: dict[int, int] = {}
    for index, block in enumerate(modules):
        for parameter_name, parameter in block.named_parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise RunError(
                    f"{kind} cannot be walked block by block: blocks {owner[id(parameter)]} and {index} "
                    f"share {parameter_name}"
                )
    return Blocks(name, modules)


@dataclass
class Call:
    """The arguments of one block for one micro-batch, without the hidden states; `position` tells where those go."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    position: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for `hidden` [batch, seqlen, width], its first element when it returns a tuple."""
        args, kwargs = self.args, self.kwargs
        if isinstance(self.position, int):
            args = (*args[: self.position], hidden, *args[self.position :])
        else:
            kwargs = {**kwargs, self.position: hidden}
        output = block(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _StandIn(nn.Module):
    """In place of a block: notes the arguments, hands the hidden states on; other attributes are the block's."""

    def __init__(
        self, block: nn.Module, calls: list[tuple[Call, Tensor]], width: int, gain: float, given: Tensor | None
    ):
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule
        self._calls, self._width, self._gain, self._given = calls, width, gain, given

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        position: int | str
        if "hidden_states" in kwargs:
            position, hidden = "hidden_states", kwargs.pop("hidden_states")
        else:
            position = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point())
            hidden = args[position]
            args = args[:position] + args[position + 1 :]
        self._calls.append((Call(args, kwargs, position), hidden))
        hidden = self._given if self._given is not None else hidden * self._gain if self._gain != 1 else hidden
        return (hidden, *[None] * (self._width - 1)) if self._width else hidden


@dataclass
class Recording:
    """What the blocks are called with: calls[micro-batch][block]; and the hidden states that enter the first."""

    hidden: list[Tensor]
    calls: list[list[Call]] = field(default_factory=list)


def record(model: nn.Module, blocks: Blocks, batches: Sequence[Tensor]) -> Recording:
    """Run the base model (not its head) with stand-ins for the blocks; batches: token ids [batch, seqlen] each.

    Raises RunError, by name, for models that hand more than hidden states from block to block.
    """
    decoder = _decoder(model, blocks)
    width = _tuple_width(model, decoder, blocks, batches[0][:1, :8])
    _refuse_side_channels(model, decoder, blocks, batches[0][:1, :8], width)
    recording = Recording([])
    first: list[Call] = []
    for batch in batches:
        noted = _noted(decoder, blocks, batch, width)
        calls = [call for call, _ in noted]
        if first:  # micro-batches mostly get equal masks and positions: keep one copy
            calls = [_interned(call, like) for call, like in zip(calls, first, strict=True)]
        else:
            first = calls
        recording.calls.append(calls)
        recording.hidden.append(noted[0][1])
    return recording


def replay(model: nn.Module, blocks: Blocks, ids: Tensor, hidden: Tensor) -> Any:
    """The model's output for ids [batch, seqlen] when its last block gives `hidden` [batch, seqlen, width].

    The blocks are not run; embedding, final norm and head are the model's own.
    """
    decoder = _decoder(model, blocks)
    width = _tuple_width(model, decoder, blocks, ids[:1, :8])
    with _stood_in(blocks, [], width, last=hidden):
        return model(input_ids=ids, use_cache=False)


def _decoder(model: nn.Module, blocks: Blocks) -> nn.Module:
    """The smallest model around the blocks that takes token ids: no head, whose logits are large."""
    candidates = [getattr(model, "get_decoder", lambda: None)(), getattr(model, "base_model", None), model]
    for candidate in candidates:
        if isinstance(candidate, nn.Module) and any(m is blocks.modules for m in candidate.modules()):
            return candidate
    raise RunError(f"{type(model).__name__}: its blocks are not part of its decoder; it cannot be walked")


@contextlib.contextmanager
def _stood_in(
    blocks: Blocks, calls: list[tuple[Call, Tensor]], width: int, gain: float = 1.0, last: Tensor | None = None
) -> Iterator[None]:
    """Stand-ins in place of all blocks; the last one gives `last`, when there is one, instead of what it was given."""
    originals = list(blocks.modules)
    for index, block in enumerate(originals):
        final = last if index == len(originals) - 1 else None
        blocks.modules[index] = _StandIn(block, calls, width, gain, final)
    try:
        yield
    finally:
        for index, block in enumerate(originals):
            blocks.modules[index] = block


def _noted(decoder: nn.Module, blocks: Blocks, ids: Tensor, width: int, gain: float = 1.0) -> list[tuple[Call, Tensor]]:
    calls: list[tuple[Call, Tensor]] = []
    with _stood_in(blocks, calls, width, gain):
        decoder(input_ids=ids, use_cache=False)
    if len(calls) != len(blocks):
        raise RunError(f"{type(decoder).__name__} called {len(calls)} of its {len(blocks)} blocks; it cannot be walked")
    return calls


def _tuple_width(model: nn.Module, decoder: nn.Module, blocks: Blocks, ids: Tensor) -> int:
    """Length of the tuple that the parent expects of its blocks; 0 for a bare tensor.

    A tensor that is taken as a tuple loses its batch dimension, which is how the wrong guess is told.
    """
    for width in range(5):
        try:
            noted = _noted(decoder, blocks, ids, width)
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            continue  # the wrong guess breaks in the parent's own code, in whatever way
        shape = noted[0][1].shape
        several = len(noted) > 1 or width > 0
        if all(h.shape == shape for _, h in noted) and (several or _last_shape(decoder, blocks, ids) == shape):
            return width
    raise RunError(f"{type(model).__name__} uses its blocks in a way that cannot be replayed; it cannot be walked")


def _last_shape(decoder: nn.Module, blocks: Blocks, ids: Tensor) -> torch.Size:
    shapes: list[torch.Size] = []
    handles = [
        m.register_forward_pre_hook(lambda _, args: shapes.extend(a.shape for a in args[:1] if isinstance(a, Tensor)))
        for m in decoder.children()
    ]
    try:
        _noted(decoder, blocks, ids, 0)
    finally:
        for handle in handles:
            handle.remove()
    return shapes[-1] if shapes else torch.Size()


def _refuse_side_channels(model: nn.Module, decoder: nn.Module, blocks: Blocks, ids: Tensor, width: int) -> None:
    """Record twice, then with changed hidden states: any other argument that follows them is a side channel."""
    plain = _noted(decoder, blocks, ids, width)
    changed = _noted(decoder, blocks, ids, width, gain=1.5)
    for index, ((one, _), (two, _)) in enumerate(zip(plain, changed, strict=True)):
        for (path, a), (_, b) in zip(_leaves(one), _leaves(two), strict=True):
            if isinstance(a, Tensor) and not torch.equal(a, b):
                raise RunError(
                    f"{type(model).__name__} cannot be walked block by block: its block {index} gets {path}, "
                    "which depends on the blocks before it, beside the hidden states"
                )


def refuse_changed_arguments(call: Call, block: nn.Module, hidden: Tensor, name: str) -> Tensor:
    """Run the block once and raise RunError when it changes an argument in place (a shared cache, say): its output."""
    before = [(path, _state(value)) for path, value in _leaves(call)]
    output = call.run(block, hidden)
    for (path, then), (_, value) in zip(before, _leaves(call), strict=False):
        if _state(value) != then:
            raise RunError(f"{name} cannot be walked block by block: it changes its argument {path} in place")
    return output


def _state(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value._version
    return len(value) if isinstance(value, (dict, list, set)) else id(value)


def _leaves(call: Call) -> Iterator[tuple[str, Any]]:
    def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        yield path, value
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(f"{path}[{key!r}]", item)
        elif isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                yield from walk(f"{path}[{index}]", item)

    for index, value in enumerate(call.args):
        yield from walk(f"argument {index}", value)
    for key, value in call.kwargs.items():
        yield from walk(key, value)


def _interned(call: Call, like: Call) -> Call:
    """`call` with every tensor that equals the one at the same place in `like` replaced by that one."""

    def intern(value: Any, known: Any) -> Any:
        if isinstance(value, Tensor):
            same = isinstance(known, Tensor) and (
                known is value
                or (known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value))
            )
            return known if same else value
        if isinstance(value, tuple) and isinstance(known, tuple) and len(value) == len(known):
            items = [intern(v, k) for v, k in zip(value, known, strict=True)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    args = tuple(intern(v, k) for v, k in zip(call.args, like.args, strict=True))
    kwargs = {key: intern(value, like.kwargs.get(key)) for key, value in call.kwargs.items()}
    return Call(args, kwargs, call.position)
