"""ADMM for a layer's weights (Boza, "Fast and Effective Weight Update for Pruned LLMs", arXiv:2401.02938)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from wanda.factors import admm_inverse
from wanda.kernels.native import multiplies_bfloat16
from wanda.kernels.selection import clear_lost
from wanda.patterns import Pattern
from wanda.updates import Problem

STEPS = 20
Choose = Callable[[int, Tensor, slice], Tensor | None]


def admm(
    problem: Problem, choose: Choose, by_row: bool, relaxation: float = 1.0, reduced: bool = False
) -> tuple[Tensor, Tensor]:
    """Alternate between least squares near the masked weights and the mask, 20 times, on inputs scaled to norm 1.

    The paper's V = (W^ H + beyond / n + Z - U) inv is taken as W^ + (beyond / n + Z - U - W^) inv, the same number with
    a product of small differences in it.
    choose: (step, V + U of some rows [rows, in], those rows) -> their mask, or None to keep the step's before.
    by_row: rows may be worked on in panels.
    relaxation: over-relaxation r, V replaced by r V + (1 - r) Z (Boyd et al., "Distributed Optimization and Statistical
        Learning via ADMM", 2011, section 3.4.3); 1 is the paper's.
    reduced: the products in bfloat16 on a processor that multiplies it itself; what is rounded is the differences.
    Returns (weights, mask), [out, in].
    """
    statistics = problem.statistics
    norm, _, inverse = admm_inverse(statistics)  # [in], float, [in, in]
    factor = inverse
    if reduced and inverse.device.type == "cpu" and multiplies_bfloat16():
        factor = inverse.bfloat16()
    beyond = problem.beyond()
    solution = torch.empty_like(problem.weight)
    mask = torch.empty(solution.shape, dtype=torch.bool, device=solution.device)
    for rows in problem.row_panels(by_row):
        scaled = problem.weight[rows] * norm  # W^
        fixed = scaled if beyond is None else torch.addmm(scaled, beyond[rows] / norm, inverse)  # V without Z and U
        fixed = fixed * relaxation
        total = scaled.clone()  # V + U, with U = 0
        kept = mask[rows]
        masked, away = torch.empty_like(total), torch.empty_like(total)  # Z; U - Z + W^
        for step in range(STEPS):
            chosen = choose(step, total, rows)
            if chosen is not None:
                mask[rows] = kept = chosen
            clear_lost(masked.copy_(total), kept)
            torch.add(total, masked, alpha=-2, out=away).add_(scaled)
            product = away.to(factor.dtype) @ factor
            # V = fixed - (U - Z + W^) inv; then r V + (1 - r) Z + U, where U = total - Z
            total.add_(masked, alpha=-relaxation).add_(fixed).add_(product, alpha=-relaxation)
        torch.mul(clear_lost(total, kept), 1 / norm, out=solution[rows])
    return solution, mask


def rising(pattern: Pattern, steps: int) -> Choose:
    """Reselect the mask on |V + U| for so many steps, the sparsity rising cubically (Zhu, Gupta, arXiv:1710.01878)."""

    def choose(step: int, total: Tensor, rows: slice) -> Tensor | None:
        if step >= steps:
            return None
        return pattern.at(pattern.sparsity * (1 - (1 - Fraction(step + 1, steps)) ** 3)).mask(total.abs())

    return choose
