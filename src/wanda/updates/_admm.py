"""ADMM for a layer's weights (Boza, "Fast and Effective Weight Update for Pruned LLMs", arXiv:2401.02938)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wanda.factors import admm_inverse
from wanda.updates import Problem

STEPS = 20


def admm(
    problem: Problem, choose: Callable[[int, Tensor, slice], Tensor | None], by_row: bool
) -> tuple[Tensor, Tensor]:
    """Alternate between least squares near the masked weights and the mask, 20 times, on inputs scaled to norm 1.

    choose: (step, |V + U| of some rows [rows, in], those rows) -> their mask, or None to keep the step's before.
    by_row: rows may be worked on in panels. Returns (weights, mask), [out, in].
    """
    statistics = problem.statistics
    norm, damping, inverse = admm_inverse(statistics)  # [in], float, [in, in]
    gram = statistics.gram
    assert gram is not None
    beyond = problem.beyond()
    solution = torch.empty_like(problem.weight)
    mask = torch.empty(solution.shape, dtype=torch.bool, device=solution.device)
    for rows in problem.row_panels(by_row):
        weight = problem.weight[rows]
        scaled = weight * norm  # W^
        target = weight @ gram  # W^ H = (W G + beyond) / n + d W^, as H = G / (n n^T) + d I
        if beyond is not None:
            target += beyond[rows]
        target.div_(norm).add_(scaled, alpha=damping)
        total = scaled  # V + U, with U = 0
        keep = torch.empty(0)
        for step in range(STEPS):
            chosen = choose(step, total, rows)
            if chosen is not None:
                mask[rows] = chosen
                keep = chosen.to(weight.dtype)
            # Z = total * M, U = total - Z, V = (W^ H + Z - U) inv
            split = torch.addcmul(-total, total, keep, value=2)  # Z - U
            dual = total.sub_(total * keep)  # U
            total = torch.addmm(dual, split.add_(target), inverse)
        torch.mul(total.mul_(keep), 1 / norm, out=solution[rows])
    return solution, mask
