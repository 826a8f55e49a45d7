"""Every prunable matrix of a block as one [out, in] view: Linear, 1x1 convolution, Conv1D, one of fused experts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

UNTOLD = "experts in one tensor whose layout its module does not tell"


@dataclass(frozen=True)
class Matrix:
    """One prunable matrix.

    name: unique in the model; the module's name, with the expert's number at the end for fused experts.
    parameter: name of the parameter it lies in, in the model.
    expert: its index in a fused [experts, ., .] parameter, None otherwise.
    transposed: the parameter holds it as [in, out] (Conv1D, some experts).
    out, width: its shape.
    router: it decides which experts a token goes to; stays dense unless it is included by name.
    """

    name: str
    parameter: str
    expert: int | None
    transposed: bool
    out: int
    width: int
    router: bool = False

    def view(self, parameter: Tensor) -> Tensor:
        """The [out, in] view of this matrix in its parameter's tensor."""
        tensor = parameter.flatten(1) if self.expert is None else parameter[self.expert]
        return tensor.T if self.transposed else tensor

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out * self.width


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer whose weight is [in, out] (GPT-2)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that maps each place by itself (1x1, not grouped): linear in its channels."""
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1 and set(module.kernel_size) == {1}
    )


def find_matrices(block: nn.Module, prefix: str) -> tuple[list[Matrix], dict[str, str]]:
    """The prunable matrices of a block in the order of its modules, and what stays dense with the reason.

    prefix: the block's name in the model, with the final dot. A fused [experts, ., .] parameter counts as one matrix
    an expert when its module tells its layout (`is_transposed`, as transformers' experts do).
    """
    matrices: list[Matrix] = []
    dense: dict[str, str] = {}
    routers = _routers(block)
    fused = [(m, p) for m in block.modules() for p in m.parameters(recurse=False) if _is_fused(m, p)]
    layouts = {type(m): told for m, p in fused if (told := _layout(m, p)) is not None}  # square ones go by their kind
    for name, module in block.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            path = f"{name}.{parameter_name}" if name else parameter_name
            full = prefix + path
            linear = isinstance(module, nn.Linear) or (name in routers and parameter.ndim == 2)
            if linear and parameter_name == "weight":
                out, width = parameter.shape
                matrices.append(Matrix(prefix + name, full, None, False, out, width, name in routers))
            elif is_transposed_linear(module) and parameter_name == "weight":
                matrices.append(Matrix(prefix + name, full, None, True, *reversed(parameter.shape)))
            elif is_pointwise(module) and parameter_name == "weight":
                matrices.append(Matrix(prefix + name, full, None, False, *parameter.shape[:2]))
            elif isinstance(module, nn.modules.conv._ConvNd) and parameter_name == "weight":
                dense[full] = "a convolution that is not 1x1"
            elif _is_fused(module, parameter):
                transposed = layouts.get(type(module))
                beside = {router.rpartition(".")[0] for router in routers}
                if transposed is not None:
                    matrices.extend(_experts(full, parameter, transposed))
                else:
                    dense[full] = UNTOLD if name.rpartition(".")[0] in beside else "a 3-D tensor that no router goes to"
            elif parameter.ndim == 2 and not isinstance(module, nn.Embedding):
                dense[full] = "not the weight of a linear layer"
    return matrices, dense


def takes_routes(experts: nn.Module) -> bool:
    """Whether an experts module is called with every token's experts and their weights, beside the hidden states."""
    return len(inspect.signature(experts.forward).parameters) >= 3


def _is_fused(module: nn.Module, parameter: Tensor) -> bool:
    return parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.modules.conv._ConvNd)


def _routers(block: nn.Module) -> set[str]:
    """Names of the modules that decide which experts a token goes to, and how much a shared expert counts.

    Whatever stands beside fused experts and ends in a map to one output, or to one an expert (up to twice as many:
    some route to experts that do nothing as well).
    """
    found: set[str] = set()
    for name, module in block.named_modules():
        counts = [p.shape[0] for p in module.parameters(recurse=False) if _is_fused(module, p)]
        parent = name.rpartition(".")[0]
        for child_name, child in block.get_submodule(parent).named_children() if counts and name else ():
            path = f"{parent}.{child_name}" if parent else child_name
            parameters = [(m, p) for m in child.modules() for p in m.parameters(recurse=False)]
            maps = [p for _, p in parameters if p.ndim == 2]
            if not maps or any(_is_fused(m, p) for m, p in parameters):
                continue
            if maps[-1].shape[0] == 1 or counts[0] <= maps[-1].shape[0] <= 2 * counts[0]:
                found.update(path + (f".{inner}" if inner else "") for inner, _ in child.named_modules())
    return found


def _layout(module: nn.Module, parameter: Tensor) -> bool | None:
    """Whether a fused parameter holds [in, out] for every expert, False for [out, in]; None when nothing tells.

    Told by the module (`is_transposed`, or the sizes of a single linear map), or by the shapes of a gated pair: a map
    from x to 2 y beside one from y to x. The taps check it again when the first product is made.
    """
    told = getattr(module, "is_transposed", None)
    if told is not None:
        return bool(told)
    sizes = (getattr(module, "input_size", None), getattr(module, "output_size", None))
    if (
        None not in sizes
        and sizes[0] != sizes[1]
        and sizes in (tuple(parameter.shape[1:]), tuple(parameter.shape[:0:-1]))
    ):
        return sizes == tuple(parameter.shape[1:])
    shapes = [tuple(p.shape[1:]) for _, p in module.named_parameters(recurse=False) if p.ndim == 3]
    if len(shapes) == 2:
        for (a, b), (c, d) in (shapes, shapes[::-1]):
            if a == d and b == 2 * c:
                return True  # [x, 2 y] and [y, x]
            if b == c and a == 2 * d:
                return False  # [2 y, x] and [x, y]
    return None


def _experts(name: str, parameter: Tensor, transposed: bool) -> Iterator[Matrix]:
    count, first, second = parameter.shape
    out, width = (second, first) if transposed else (first, second)
    for expert in range(count):
        yield Matrix(f"{name}.{expert}", name, expert, transposed, out, width)
