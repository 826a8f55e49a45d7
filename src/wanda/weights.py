"""Every prunable matrix of a block as one [out, in] view: Linear, Conv1D, one expert of a fused tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Matrix:
    """One prunable matrix.

    name: unique in the model; the module's name, with the expert's number at the end for fused experts.
    parameter: name of the parameter it lies in, in the model.
    expert: its index in a fused [experts, ., .] parameter, None otherwise.
    transposed: the parameter holds it as [in, out] (Conv1D, some experts).
    out, width: its shape.
    """

    name: str
    parameter: str
    expert: int | None
    transposed: bool
    out: int
    width: int

    def view(self, parameter: Tensor) -> Tensor:
        """The [out, in] view of this matrix in its parameter's tensor."""
        tensor = parameter if self.expert is None else parameter[self.expert]
        return tensor.T if self.transposed else tensor

    @property
    def numel(self) -> int:
        return self.out * self.width


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer whose weight is [in, out] (GPT-2)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_matrices(block: nn.Module, prefix: str) -> tuple[list[Matrix], dict[str, str]]:
    """The prunable matrices of a block in the order of its modules, and what stays dense with the reason.

    prefix: the block's name in the model, with the final dot. A fused [experts, ., .] parameter counts as one matrix
    an expert when its module tells its layout (`is_transposed`, as transformers' experts do).
    """
    matrices: list[Matrix] = []
    dense: dict[str, str] = {}
    for name, module in block.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            path = f"{name}.{parameter_name}" if name else parameter_name
            full = prefix + path
            if isinstance(module, nn.Linear) and parameter_name == "weight":
                matrices.append(Matrix(prefix + name, full, None, False, *parameter.shape))
            elif is_transposed_linear(module) and parameter_name == "weight":
                matrices.append(Matrix(prefix + name, full, None, True, *reversed(parameter.shape)))
            elif parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, nn.modules.conv._ConvNd):
                transposed = _layout(module, parameter)
                if transposed is None:
                    dense[full] = "a fused tensor whose layout its module does not tell"
                else:
                    matrices.extend(_experts(full, parameter, bool(transposed)))
            elif parameter.ndim == 2 and not isinstance(module, nn.Embedding):
                dense[full] = "not the weight of a linear layer"
    return matrices, dense


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
