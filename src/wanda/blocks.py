"""The blocks of a model: finding them, and recording the arguments each is called with.

No code here knows an architecture. A decoder's blocks are the outermost ModuleList as long as the config says, an image
classifier's are the chain that wanda.chain finds; every block's own arguments (masks, position embeddings) are noted by
a stand-in, since sliding-window and hybrid models give different ones to different blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wanda.activations import Activations
from wanda.chain import Chain, find_chain, first_tensor, hidden_argument, watch
from wanda.errors import ConfigurationError, RunError


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model in the order of their execution: their names in it, and the modules.

    chain: what is known of an image classifier's blocks; None for a decoder's.
    """

    names: tuple[str, ...]
    modules: Sequence[nn.Module]
    chain: Chain | None = None

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def name(self) -> str:
        """What all of their names begin with: the list that holds a decoder's blocks."""
        return self.names[0].rpartition(".")[0]

    def prefix(self, index: int) -> str:
        """What the names of block `index`'s parameters begin with."""
        return f"{self.names[index]}." if self.names[index] else ""

    def prunable(self, name: str) -> bool:
        """Whether the matrix of this name is one to prune: not of a stem, a head or what stands between stages."""
        return self.chain is None or any(name.startswith(f"{unit}.") for unit in self.chain.units)


def takes_images(model: nn.Module) -> bool:
    """Whether a model's input is an image: an image classifier; else it is a decoder's, token ids."""
    return getattr(model, "main_input_name", "input_ids") == "pixel_values"


def find_blocks(model: nn.Module) -> Blocks:
    """A decoder's outermost ModuleList whose length is the config's num_hidden_layers; an image classifier's chain.

    Raises ConfigurationError when there is none, or when blocks share parameters (pruning one would change another).
    """
    kind = type(model).__name__
    if takes_images(model):
        chain = find_chain(model)
        blocks = Blocks(chain.names, [model.get_submodule(name) for name in chain.names], chain)
    else:
        count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if not found:
            raise ConfigurationError(
                f"{kind} has no list of {count} blocks to walk; it is not a decoder that can be pruned"
            )
        name, modules = min(found, key=lambda item: item[0].count("."))
        blocks = Blocks(tuple(f"{name}.{index}" for index in range(count)), list(modules))
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks.modules):
        for parameter_name, parameter in block.named_parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise ConfigurationError(
                    f"{kind} cannot be walked block by block: blocks {owner[id(parameter)]} and {index} "
                    f"share {parameter_name}"
                )
    return blocks


@dataclass
class Call:
    """The arguments of one block for one micro-batch, without the hidden states; `position` tells where those go."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    position: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for `hidden` [batch, ...], its first tensor when it returns more."""
        args, kwargs = self.args, self.kwargs
        if isinstance(self.position, int):
            args = (*args[: self.position], hidden, *args[self.position :])
        else:
            kwargs = {**kwargs, self.position: hidden}
        return first_tensor(block(*args, **kwargs))


Answer = Callable[[Tensor], Any]  # what a stand-in returns for hidden states


def _handed_on(width: int, gain: float = 1.0) -> Answer:
    """The hidden states themselves (times `gain`), as the first of a tuple of `width` where that is not 0."""

    def answer(hidden: Tensor) -> Any:
        hidden = hidden * gain if gain != 1 else hidden
        return (hidden, *[None] * (width - 1)) if width else hidden

    return answer


class _StandIn(nn.Module):
    """In place of a block: notes the arguments, gives an answer; other attributes are the block's."""

    def __init__(self, block: nn.Module, calls: list[tuple[Call, Tensor]], answer: Answer):
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule
        self._calls, self._answer = calls, answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        position = hidden_argument(args, kwargs)
        if position is None:
            raise RunError("a block is called without hidden states; it cannot be walked")
        hidden: Tensor
        if isinstance(position, int):
            hidden = args[position]
            args = args[:position] + args[position + 1 :]
        else:
            hidden = kwargs.pop(position)
        self._calls.append((Call(args, kwargs, position), hidden))
        return self._answer(hidden)


@dataclass
class Recording:
    """What the blocks are called with: calls[micro-batch][block]; and the hidden states that enter the first."""

    hidden: Activations
    calls: list[list[Call]] = field(default_factory=list)


def record(model: nn.Module, blocks: Blocks, batches: Sequence[Tensor], hidden: Activations | None = None) -> Recording:
    """Run the model (a decoder without its head) with stand-ins for the blocks.

    batches: token ids [batch, seqlen] each, or images [batch, channels, height, width]. hidden: where the states that
    enter the first block are appended as they come; in memory when nothing is said. Raises RunError, by name, for
    models that hand more than hidden states from block to block.
    """
    if blocks.chain is None:
        decoder = _decoder(model, blocks)
        width = _tuple_width(model, decoder, blocks, batches[0][:1, :8])
        _refuse_side_channels(
            model, *(_noted(decoder, blocks, batches[0][:1, :8], _handed_on(width, gain)) for gain in (1.0, 1.5))
        )
        noted = (_noted(decoder, blocks, batch, _handed_on(width)) for batch in batches)
    else:
        _refuse_side_channels(model, *(_noted_images(model, blocks, batches[0][:1], fill) for fill in (0.0, 1.0)))
        noted = (_noted_images(model, blocks, batch) for batch in batches)
    recording = Recording(Activations([]) if hidden is None else hidden)
    first: list[Call] = []
    for each in noted:
        calls = [call for call, _ in each]
        if first:  # micro-batches mostly get equal masks and positions: keep one copy
            calls = [_interned(call, like) for call, like in zip(calls, first, strict=True)]
        else:
            first = calls
        recording.calls.append(calls)
        recording.hidden.append(each[0][1])
    return recording


def replay(model: nn.Module, blocks: Blocks, ids: Tensor, hidden: Tensor) -> Any:
    """The decoder's output for ids [batch, seqlen] when its last block gives `hidden` [batch, seqlen, width].

    The blocks are not run; embedding, final norm and head are the model's own.
    """
    width = _tuple_width(model, _decoder(model, blocks), blocks, ids[:1, :8])
    answers = [_handed_on(width)] * len(blocks)
    answers[-1] = lambda _: _handed_on(width)(hidden)
    with _stood_in(model, blocks, [], answers):
        return model(input_ids=ids, use_cache=False)


def _decoder(model: nn.Module, blocks: Blocks) -> nn.Module:
    """The smallest model around the blocks that takes token ids: no head, whose logits are large."""
    candidates = [getattr(model, "get_decoder", lambda: None)(), getattr(model, "base_model", None), model]
    for candidate in candidates:
        if isinstance(candidate, nn.Module) and any(m is blocks.modules[0] for m in candidate.modules()):
            return candidate
    raise RunError(f"{type(model).__name__}: its blocks are not part of its decoder; it cannot be walked")


@contextlib.contextmanager
def _stood_in(
    root: nn.Module, blocks: Blocks, calls: list[tuple[Call, Tensor]], answers: Sequence[Answer]
) -> Iterator[None]:
    """Stand-ins, each with its answer, in place of all blocks of the model that `root` is, or is a part of."""
    owners = {id(child): (parent, name) for parent in root.modules() for name, child in parent.named_children()}
    for block, answer in zip(blocks.modules, answers, strict=True):
        parent, name = owners[id(block)]
        parent._modules[name] = _StandIn(block, calls, answer)
    try:
        yield
    finally:
        for block in blocks.modules:
            parent, name = owners[id(block)]
            parent._modules[name] = block


def _noted(decoder: nn.Module, blocks: Blocks, ids: Tensor, answer: Answer) -> list[tuple[Call, Tensor]]:
    calls: list[tuple[Call, Tensor]] = []
    with _stood_in(decoder, blocks, calls, [answer] * len(blocks)):
        decoder(input_ids=ids, use_cache=False)
    if len(calls) != len(blocks):
        raise RunError(f"{type(decoder).__name__} called {len(calls)} of its {len(blocks)} blocks; it cannot be walked")
    return calls


def _noted_images(model: nn.Module, blocks: Blocks, images: Tensor, fill: float = 0.0) -> list[tuple[Call, Tensor]]:
    """The calls for images; stand-ins answer with tensors of the right shapes, which differ from stage to stage."""
    images = images.to(next(model.parameters()).dtype)
    if blocks.modules[0] is model:
        return [(Call((), {}, 0), images)]
    leaving = {node.name: node.leaving for node in watch(model, tuple(images.shape))}

    def answer(shapes: Any) -> Answer:
        def made(like: Any) -> Any:
            return torch.full_like(like, fill, device=images.device) if isinstance(like, Tensor) else like

        return lambda _: pytree.tree_map(made, shapes)

    calls: list[tuple[Call, Tensor]] = []
    with _stood_in(model, blocks, calls, [answer(leaving[name]) for name in blocks.names]):
        model(images)
    return calls


def _tuple_width(model: nn.Module, decoder: nn.Module, blocks: Blocks, ids: Tensor) -> int:
    """Length of the tuple that the parent expects of its blocks; 0 for a bare tensor.

    A tensor that is taken as a tuple loses its batch dimension, which is how the wrong guess is told.
    """
    for width in range(5):
        try:
            noted = _noted(decoder, blocks, ids, _handed_on(width))
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
        _noted(decoder, blocks, ids, _handed_on(0))
    finally:
        for handle in handles:
            handle.remove()
    return shapes[-1] if shapes else torch.Size()


def _refuse_side_channels(
    model: nn.Module, plain: list[tuple[Call, Tensor]], changed: list[tuple[Call, Tensor]]
) -> None:
    """Recorded twice, then a third time with changed hidden states: what follows those is a side channel."""
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
