"""The layers of a model that runs from a packed checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wanda.kernels.packed import COLUMNS, PackedMatrix, dense_multiply

DENSE_COLUMNS = 4  # tokens up to which our dense kernel was not slower than torch's at any size (docs/runtime.md)


class PackedLinear(nn.Module):
    """nn.Linear whose weight stays packed; the matrix is no parameter, so `to` and training leave it as it is.

    dtype: of inputs, bias and outputs; the matrix's own, or float32. The state_dict holds the dense weight, so that
    save_pretrained writes an ordinary checkpoint.
    """

    def __init__(self, matrix: PackedMatrix, bias: nn.Parameter | None, dtype: torch.dtype | None = None):
        super().__init__()
        self.matrix = matrix
        self.bias = bias
        self.dtype = dtype or matrix.dtype
        self.in_features, self.out_features = matrix.width, matrix.out

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], made anew on every access: code that looks at a layer's type or values works."""
        return self.matrix.dense(dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]; gradients flow to x and the bias through a dense copy of the weight."""
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return functional.linear(x, self.weight, self.bias)
        return self.matrix.multiply(x, self.bias)

    def extra_repr(self) -> str:
        size = self.matrix.out * self.matrix.width
        share = 1 - self.matrix.survivors / size if size else 0.0
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={share:.3f}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.matrix.dense_while_held(self.dtype)


def _dense(value: Any) -> Any:
    """Tables as dense tensors, in lists and tuples too."""
    if isinstance(value, PackedTable):
        return value.dense()
    return type(value)(map(_dense, value)) if type(value) in (list, tuple) else value


class PackedTable:
    """The weight of an embedding layer, of whatever class, that stays packed: [out, width], read by rows.

    functional.embedding takes the rows that are asked for; every other function and attribute takes a dense copy, made
    anew each time. dtype: of what it gives.
    """

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype):
        self.matrix, self.dtype = matrix, dtype
        self.shape, self.device = torch.Size((matrix.out, matrix.width)), torch.device("cpu")

    def dense(self) -> Tensor:
        """The whole weight."""
        return self.matrix.dense(dtype=self.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "matrix" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.embedding and len(args) > 1 and isinstance(args[1], cls):
            return args[1].matrix.rows(args[0], args[1].dtype)
        return function(*map(_dense, args), **{name: _dense(value) for name, value in (kwargs or {}).items()})

    def put_into(self, embedding: nn.Embedding) -> None:
        """Make it the layer's weight; the layer's state_dict holds the dense one."""

        def save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            state[prefix + "weight"] = self.matrix.dense_while_held(self.dtype)

        del embedding.weight
        embedding.weight = self  # type: ignore[assignment]
        embedding.register_state_dict_post_hook(save)


class FastLinear(nn.Linear):
    """nn.Linear of bfloat16 where we have a dense kernel (`tiled`); few tokens take it, since it beats torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        weight = self.weight
        few = x.numel() <= DENSE_COLUMNS * self.in_features
        plain = weight.is_cpu and x.is_cpu and weight.dtype == x.dtype == torch.bfloat16 and weight.is_contiguous()
        if few and plain and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            return dense_multiply(weight, x, self.bias)
        return super().forward(x)

    @classmethod
    def of(cls, linear: nn.Linear) -> FastLinear:
        """The same layer with the same parameters (not copies, so that tied weights stay tied)."""
        fast = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        fast.weight, fast.bias = linear.weight, linear.bias
        return fast.train(linear.training)


assert DENSE_COLUMNS <= COLUMNS
