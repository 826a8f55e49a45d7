"""What calibration accumulates of the inputs of a matrix. All sums are float32, whatever the inputs' type."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from wanda.kernels.columns import square_sum
from wanda.kernels.products import PANEL, add_product


class Needs(enum.IntEnum):
    """What a score or an update needs to know of the inputs; a larger one includes the smaller."""

    NOTHING = 0
    NORMS = 1
    GRAM = 2


class Statistics:
    """Sums over the calibration tokens of one input X [tokens, in], shared by every matrix that multiplies it.

    owner: the matrix that the input was first seen at, for messages.
    tokens: number of tokens seen. reduced: the sums are over all processes already.
    square_sum: [in], sum over tokens of x_j^2 (the Gram matrix's diagonal where there is one); None for NOTHING.
    gram: [in, in], X^T X; None unless a Gram matrix is needed.
    lag: [in, in], (X_dense - X)^T X with X_dense the dense model's inputs at the same place; None unless the
        errors inherited from earlier layers are to be repaired.
    cache: factors that several matrices with this input share, see wanda.factors; emptied by every update.
    notes: sentences about those factors for the report (damping raised, say).
    """

    def __init__(
        self,
        width: int,
        needs: Needs,
        device: torch.device | str = "cpu",
        inherit: bool = False,
        owner: str = "",
    ) -> None:
        if inherit and needs < Needs.GRAM:
            raise ValueError("inherited errors are repaired with a Gram matrix")
        self.width = width
        self.needs = needs
        self.device = device
        self.inherit = inherit
        self.owner = owner
        self.tokens = 0
        self.reduced = False
        self.cache: dict[Any, Any] = {}
        self.notes: list[str] = []
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float32, device=device)  # noqa: E731
        self._gram = zeros(width, width) if needs >= Needs.GRAM else None
        self._mirrored = True  # the lower triangle of _gram is up to date
        self.lag = zeros(width, width) if inherit else None
        self.square_sum: Tensor | None = None
        if self._gram is not None:
            self.square_sum = self._gram.diagonal()  # a view: always the sums of the products themselves
        elif needs >= Needs.NORMS:
            self.square_sum = zeros(width)

    @staticmethod
    def memory(width: int, needs: Needs, inherit: bool = False) -> int:
        """Bytes that the sums over inputs of this width take."""
        return 4 * {Needs.NOTHING: 0, Needs.NORMS: width, Needs.GRAM: width * width * (1 + inherit)}[needs]

    @property
    def gram(self) -> Tensor | None:
        """X^T X, both triangles: [in, in]; None unless it is needed."""
        if self._gram is not None and not self._mirrored:
            for start in range(0, self.width, PANEL):
                stop = min(start + PANEL, self.width)
                corner = self._gram[start:stop, start:stop]
                corner.copy_(corner.triu() + corner.triu(1).T)
                self._gram[stop:, start:stop] = self._gram[start:stop, stop:].T
            self._mirrored = True
        return self._gram

    def update(self, inputs: Tensor, dense_inputs: Tensor | None = None) -> None:
        """Add the tokens of `inputs` [..., in] (and of the dense model there, when errors are inherited)."""
        x = inputs.detach().reshape(-1, self.width)
        self.tokens += x.shape[0]
        self.cache.clear()
        self.notes.clear()
        if self._gram is None:
            if self.square_sum is not None:
                self.square_sum += square_sum(x)
            return
        if self.inherit != (dense_inputs is not None):
            raise ValueError("the dense model's inputs belong to inherited errors, and only to them")
        self._mirrored = False
        add_product(self._gram, x, x, upper=True)
        if self.lag is not None and dense_inputs is not None:
            dense = dense_inputs.detach().reshape(-1, self.width)
            if x.dtype != torch.bfloat16:  # whose rounding of the difference (0.4% of it) a right-hand side can bear
                dense = dense.float()
            add_product(self.lag, dense - x, x)

    def forget_lag(self) -> None:
        """Go on without the dense model's inputs: there is none that goes with each of these."""
        self.inherit, self.lag = False, None

    def input_norm(self) -> Tensor:
        """L2 norm of every input feature over the calibration tokens: [in]."""
        assert self.square_sum is not None
        return self.square_sum.sqrt()

    def tensors(self) -> list[Tensor]:
        """The sums themselves, to be reduced in place over processes before anything is made of them."""
        sums = [self.gram, self.lag] if self._gram is not None else [self.square_sum]
        return [tensor for tensor in sums if tensor is not None]
