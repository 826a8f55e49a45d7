"""The chain of blocks of an image classifier, found by watching one forward pass on the meta device.

No code here knows an architecture. The units are the outermost modules whose class repeats (layers, or stages that hold
layers). Modules are called one after the other; a block of the chain takes exactly the tensor that the one before it
gave. A stage is opened into its layers, and into what stands between stages (downsampling, patch merging), where these
make such a chain; where something happens between two modules, the module around both is one block.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wanda.errors import ConfigurationError
from wanda.weights import find_matrices

_SIDES = (224, 384, 32)  # of an image, in turn, where a config does not tell


@dataclass
class Node:
    """A module's call in a forward pass: what came in, what went out, the calls inside it, in their order."""

    name: str
    module: nn.Module
    entering: Tensor | None = None
    leaving: Any = None
    versions: tuple[int, int] = (0, 0)  # of the tensor that came in, and of the one that went out
    inner: list[Node] = field(default_factory=list)

    def __iter__(self) -> Iterator[Node]:
        yield self
        for node in self.inner:
            yield from node


@dataclass(frozen=True)
class Chain:
    """Blocks in the order of their execution, by name; units: the repeated modules, whose matrices are to be pruned.

    positions: most places of an image (patches, pixels of a map) in the hidden states between blocks.
    width: numbers a place.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    positions: int
    width: int


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where the hidden states are among a block's arguments: by their usual name, else the first floating tensor."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return next((key for key, a in places if isinstance(a, Tensor) and a.is_floating_point()), None)


def first_tensor(output: Any) -> Any:
    """The hidden states in what a block returns: a tensor, or the first thing of a tuple or of a model's output."""
    if isinstance(output, dict):
        output = tuple(output.values())
    return first_tensor(output[0]) if isinstance(output, (tuple, list)) and output else output


def watch(model: nn.Module, shape: tuple[int, ...]) -> Node:
    """One forward pass for images [batch, channels, height, width], on the meta device wherever the weights are."""
    root: list[Node] = []
    stack: list[Node] = []
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = hidden_argument(args, kwargs)
        entering = None if place is None else args[place] if isinstance(place, int) else kwargs[place]
        node = Node(names[module], module, entering)
        node.versions = (0 if entering is None else entering._version, 0)
        (stack[-1].inner if stack else root).append(node)
        stack.append(node)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        node = stack.pop()
        node.leaving = output
        tensor = first_tensor(output)
        node.versions = (node.versions[0], tensor._version if isinstance(tensor, Tensor) else 0)

    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    dtype = next(p.dtype for _, p in tensors if p.is_floating_point())
    try:
        with torch.no_grad():
            torch.func.functional_call(
                model,
                {name: tensor.to("meta") for name, tensor in tensors},
                (torch.empty(shape, dtype=dtype, device="meta"),),
            )
    finally:
        for handle in handles:
            handle.remove()
    return root[0]


def channels_of(model: Any) -> int:
    """Channels of the images that a model takes."""
    return image_shapes(model.config)[0][0]


def image_shapes(config: Any) -> list[tuple[int, int, int]]:
    """Channels, height and width of an image that a config tells of, then guesses."""
    found: list[tuple[int, int, int]] = []
    channels = getattr(config, "num_channels", None) or 3
    card = getattr(config, "pretrained_cfg", None) or {}
    config = config if hasattr(config, "image_size") else getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or (getattr(config, "model_args", None) or {}).get("img_size")
    if card.get("input_size"):
        channels = card["input_size"][0]
    if size is not None:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        found.append((channels, height, width))
    if card.get("input_size"):
        found.append(tuple(card["input_size"]))
    return [*found, *((channels, side, side) for side in _SIDES)]


def find_chain(model: nn.Module) -> Chain:
    """The chain of an image classifier; one block, the model itself, when it cannot be divided.

    Raises ConfigurationError when no class of modules repeats, or no size of image passes through the model.
    """
    kind = type(model).__name__
    units = repeated_units(model)
    if not units:
        raise ConfigurationError(
            f"{kind} has no repeated blocks that hold linear layers; it is no classifier that can be pruned"
        )
    why: Exception | None = None
    for shape in image_shapes(model.config):
        try:
            root = watch(model, (1, *shape))
            break
        except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, IndexError) as error:
            why = why or error
    else:
        raise ConfigurationError(f"{kind}: images of no size that its config names pass through it ({why})")
    calls = Counter(node.name for node in root)
    blocks = _cover(root, frozenset(units), calls, True, True)
    positions = width = 1
    for node in blocks:
        least = min((m.width for m in find_matrices(node.module, "")[0]), default=0)
        if least and node.entering is not None:
            places = max(1, node.entering.numel() // least)
            positions, width = max(positions, places), max(width, least)
    return Chain(tuple(node.name for node in blocks), units, positions, width)


def repeated_units(model: nn.Module) -> tuple[str, ...]:
    """Names of the outermost modules whose class repeats and that hold a matrix, in the order of the modules.

    A class of which any instance lies inside another repeated module is a part of those, wherever else it occurs.
    """
    composite = {
        name: module
        for name, module in model.named_modules()
        if next(module.children(), None) is not None
        and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        and find_matrices(module, "")[0]
    }
    counts = Counter(type(module) for module in composite.values())
    repeated = {name: type(module) for name, module in composite.items() if counts[type(module)] > 1}
    parts = {
        kind
        for name, kind in repeated.items()
        if any(name.startswith(outer + ".") and other is not kind for outer, other in repeated.items())
    }
    units: list[str] = []
    for name, kind in repeated.items():
        if kind not in parts and not any(name.startswith(unit + ".") for unit in units):
            units.append(name)
    return tuple(units)


def _cover(node: Node, units: frozenset[str], calls: Counter[str], open_start: bool, open_end: bool) -> list[Node]:
    """The finest chain inside a call that holds all units and can take its place; the call itself when there is none.

    open_start: what comes before the first unit need not belong to the chain (it is computed as it is); open_end: nor
    what comes after the last one.
    """
    inner = _flat(node.inner)
    if node.name in units:
        carriers = [n for n in inner if find_matrices(n.module, "")[0]]
        simple = all(next(n.module.children(), None) is not None for n in carriers)
        return inner if len(carriers) > 1 and simple and _replaces(inner, node, calls, False, False) else [node]
    holding = [index for index, n in enumerate(inner) if _holds(n, units)]
    if not holding:
        return [node]
    part = inner[holding[0] if open_start else 0 : holding[-1] + 1 if open_end else len(inner)]
    if not _replaces(part, node, calls, open_start, open_end):
        return [node]
    return [
        block
        for n in part
        for block in _cover(n, units, calls, open_start and n is part[0], open_end and n is part[-1])
    ]


def _flat(nodes: list[Node]) -> list[Node]:
    """The calls with those of a Sequential in its place."""
    flat: list[Node] = []
    for node in nodes:
        flat += _flat(node.inner) if type(node.module) is nn.Sequential and node.inner else [node]
    return flat


def _holds(node: Node, units: frozenset[str]) -> bool:
    return any(unit == node.name or unit.startswith(node.name + ".") for unit in units)


def _replaces(part: list[Node], node: Node, calls: Counter[str], open_start: bool, open_end: bool) -> bool:
    """Whether each call takes what the one before it gave, and the part as a whole takes and gives what `node` does."""
    if any(calls[n.name] != 1 for n in part):
        return False
    links = [(a.leaving, a.versions[1], b.entering, b.versions[0]) for a, b in itertools.pairwise(part)]
    if not open_start:
        links.append((node.entering, node.versions[0], part[0].entering, part[0].versions[0]))
    if not open_end:
        links.append((part[-1].leaving, part[-1].versions[1], first_tensor(node.leaving), node.versions[1]))
    return all(b is not None and first_tensor(a) is b and v == w for a, v, b, w in links)
