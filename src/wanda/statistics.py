"""What calibration accumulates of the inputs of a matrix. All of it is float32, whatever the inputs' type."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Needs(enum.IntEnum):
    """What a score or an update needs to know of the inputs; a larger one includes the smaller."""

    NOTHING = 0
    NORMS = 1
    GRAM = 2


@dataclass
class Statistics:
    """Sums over the calibration tokens of one input X [tokens, in], shared by every matrix that multiplies it.

    tokens: number of tokens seen.
    square_sum: [in], sum over tokens of x_j^2; None when nothing is needed.
    gram: [in, in], X^T X; None unless a Gram matrix is needed.
    lag: [in, in], (X_dense - X)^T X with X_dense the dense model's inputs at the same place; None unless the
        errors inherited from earlier layers are to be repaired.
    cache: factors that several matrices with this input share (a Cholesky factor, say), filled by scores and updates.
    """

    width: int
    needs: Needs
    device: torch.device | str = "cpu"
    inherit: bool = False
    tokens: int = 0
    square_sum: Tensor | None = None
    gram: Tensor | None = None
    lag: Tensor | None = None
    cache: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float32, device=self.device)  # noqa: E731
        if self.needs >= Needs.NORMS and self.square_sum is None:
            self.square_sum = zeros(self.width)
        if self.needs >= Needs.GRAM and self.gram is None:
            self.gram = zeros(self.width, self.width)
        if self.inherit and self.lag is None:
            self.lag = zeros(self.width, self.width)

    def update(self, inputs: Tensor, dense_inputs: Tensor | None = None) -> None:
        """Add the tokens of `inputs` [..., in] (and of the dense model at the same place, when errors are inherited)."""
        x = inputs.reshape(-1, self.width)
        self.tokens += x.shape[0]
        if self.square_sum is not None and self.gram is None:
            self.square_sum += square_sum(x)
        if self.gram is not None:
            x32 = x.float()
            self.gram.addmm_(x32.T, x32)
            if self.lag is not None:
                if dense_inputs is None:
                    raise ValueError("inherited errors need the dense model's inputs")
                self.lag.addmm_((dense_inputs.reshape(-1, self.width).float() - x32).T, x32)
            self.square_sum = self.gram.diagonal()

    def input_norm(self) -> Tensor:
        """L2 norm of every input feature over the calibration tokens: [in]."""
        assert self.square_sum is not None
        return self.square_sum.sqrt()

    def tensors(self) -> list[Tensor]:
        """The sums themselves, to be reduced over processes."""
        sums = [self.gram, self.lag] if self.gram is not None else [self.square_sum]
        return [tensor for tensor in sums if tensor is not None]


def square_sum(x: Tensor) -> Tensor:
    """Sum of squares of every column of x [tokens, in], accumulated in float32: [in]."""
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
