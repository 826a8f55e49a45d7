"""Taps: seeing every product with a prunable matrix, whichever module or function makes it.

Module hooks miss experts kept as one 3-D parameter and weights that are used without calling their module; a
TorchFunctionMode sees the product itself and knows the matrix by the place of its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanda.errors import RunError
from wanda.weights import Matrix

Hit = tuple[Matrix, Tensor]  # a matrix and the input [..., in] it is multiplied with

_X_TIMES_W = {  # the arguments (input, weight) of a product input @ weight
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.bmm: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.mm: (0, 1),
    Tensor.bmm: (0, 1),
    Tensor.__matmul__: (0, 1),
    torch.addmm: (1, 2),
    torch.baddbmm: (1, 2),
    Tensor.addmm: (1, 2),
}
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)  # those of torch.nn.functional are the same
_PRODUCTS = frozenset({nn.functional.linear, *_X_TIMES_W, *_CONVOLUTIONS})


def _each(value: Any, count: int) -> tuple[int, ...]:
    """A number for every dimension, or the numbers of all dimensions."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


class Taps(TorchFunctionMode):
    """While active, calls `on_product(hits, compute)` in place of every product with one of the matrices.

    hits: the matrices of the product with their inputs (several when a batched product runs all experts at once).
    compute: runs the product. on_product returns the product's value; the taps are off while it runs.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        matrices: Sequence[Matrix],
        on_product: Callable[[list[Hit], Callable[[], Any]], Any],
    ):
        super().__init__()
        self.on_product = on_product
        self._single: dict[int, tuple[Matrix, Tensor]] = {}
        self._fused: dict[int, list[tuple[Matrix, Tensor]]] = {}
        for matrix in matrices:
            parameter = parameters[matrix.parameter]
            view = matrix.view(parameter)
            self._single[view.data_ptr()] = (matrix, view)
            if matrix.expert is not None:
                self._fused.setdefault(parameter.data_ptr(), []).append((matrix, view))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:  # nearly all calls: experts make many small ones
            return func(*args, **kwargs)
        hits: list[Hit] = []
        if func is nn.functional.linear:
            x = args[0] if args else kwargs["input"]
            hits = self._match(x, args[1] if len(args) > 1 else kwargs["weight"], contracted=-1)
        elif func in _CONVOLUTIONS and len(args) > 1:
            hits = self._match_convolution(*args, **kwargs)
        elif func in _X_TIMES_W:
            first, second = _X_TIMES_W[func]
            if len(args) > second:
                x, w = args[first], args[second]
                hits = self._match(x, w, contracted=-2)
                if not hits and x.ndim >= 2 and w.ndim >= 2:  # weight @ input^T
                    hits = self._match(w.transpose(-1, -2), x, contracted=-1)
        if not hits:
            return func(*args, **kwargs)
        return self.on_product(hits, lambda: func(*args, **kwargs))

    def _match(self, x: Tensor, weight: Any, contracted: int) -> list[Hit]:
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            return []
        pointer = weight.data_ptr()
        fused = self._fused.get(pointer) if weight.ndim == 3 else None
        if fused is not None and weight.shape[0] == len(fused):
            for matrix, view in fused:
                self._check(matrix, view, weight, contracted)
            # rows of zeros stand for tokens that went to other experts
            return [(matrix, x[index][x[index].any(dim=-1)]) for index, (matrix, _) in enumerate(fused)]
        found = self._single.get(pointer)
        if found is None or weight.ndim != 2:
            return []
        self._check(*found, weight, contracted)
        return [(found[0], x)]

    def _match_convolution(
        self, x: Tensor, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, *_: Any, **__: Any
    ) -> list[Hit]:
        """A 1x1 convolution is a product at every place that its stride meets."""
        found = self._single.get(weight.data_ptr()) if isinstance(weight, Tensor) and weight.ndim > 2 else None
        if found is None:
            return []
        count = weight.ndim - 2  # dimensions of the map
        steps, sides = _each(stride, count), _each(0 if isinstance(padding, str) else padding, count)
        if any(sides):
            x = nn.functional.pad(x, [side for side in reversed(sides) for _ in range(2)])
        x = x.movedim(-count - 1, -1)  # [batch, ..., in]
        if set(steps) != {1}:
            places: Any = (..., *(slice(None, None, step) for step in steps), slice(None))
            x = x[places]
        return [(found[0], x)]

    @staticmethod
    def _check(matrix: Matrix, view: Tensor, weight: Tensor, contracted: int) -> None:
        if weight.shape[contracted] != matrix.width or weight.stride(contracted) != view.stride(1):
            raise RunError(
                f"{matrix.name} is multiplied along its other dimension than its module says (layout of experts); "
                "leave it out with --exclude"
            )
