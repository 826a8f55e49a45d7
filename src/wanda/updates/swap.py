"""Swap: a mask refined by exchanging a kept and a pruned weight of a row while that lowers the row's output error.

The like of DSnoT (arXiv:2310.08915) with the exact change of the squared error: with r = W - B and c = r G + beyond,
pruning u and restoring v changes it by 2 w_u c_u + w_u^2 G_uu - 2 w_v c_v + w_v^2 G_vv - 2 w_u w_v G_uv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wanda.patterns import NM
from wanda.statistics import Needs
from wanda.updates import UPDATES, Problem

ROUNDS = 200  # swaps of one row at most; every one lowers the error
GAIN = 1e-6  # a swap has to win this part of the row's present error, or rounding might swap for ever


@UPDATES.register
class Swap:
    """Refine the score's mask, one swap a row at a time until none helps; survivors keep their dense values.

    With N:M the best of all swaps inside the groups. Else the best that has the single best weight to prune or to
    restore in it: looking at all pairs would cost a row in^2 a swap.
    """

    needs = Needs.GRAM
    owns_mask = False
    takes_chain = False
    solves = True
    within_rows = True
    factor_memory = 0
    weight_memory = (28, 28)

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]:
        gram = problem.statistics.gram
        assert gram is not None
        mask = problem.select(problem.weight, slice(None)).clone()
        beyond = problem.beyond()
        find = best_in_groups(gram, problem.pattern.m) if isinstance(problem.pattern, NM) else best_in_row(gram)
        unfinished = 0
        for rows in problem.row_panels():
            weight, keep = problem.weight[rows], mask[rows]
            removed = torch.where(keep, 0, weight)
            slope = removed @ gram  # c [rows, in]
            error = torch.linalg.vecdot(removed, slope)
            if beyond is not None:
                slope += beyond[rows]
            active = torch.arange(weight.shape[0], device=weight.device)
            for _ in range(ROUNDS):
                w, m, c = weight[active], keep[active], slope[active]
                change, u, v = find(w, m, c)
                helps = change < -GAIN * error[active].abs()
                active, u, v = active[helps], u[helps], v[helps]
                if active.numel() == 0:
                    break
                error[active] += change[helps]
                keep[active, u] = False
                keep[active, v] = True
                slope[active] += weight[active, u, None] * gram[u] - weight[active, v, None] * gram[v]
            unfinished += active.numel()
            mask[rows] = keep
        if unfinished:
            problem.notes.append(f"swap: {unfinished} of {mask.shape[0]} rows stopped after {ROUNDS} swaps")
        return torch.where(mask, problem.weight, 0), mask


def costs(w: Tensor, keep: Tensor, c: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Change of the error by pruning each kept weight, and by restoring each pruned one; infinite for the others."""
    square = w.square() * diagonal
    linear = 2 * w * c
    return torch.where(keep, square + linear, torch.inf), torch.where(keep, torch.inf, square - linear)


def best_in_row(gram: Tensor):
    """(w, keep, c, each [rows, in]) -> (change, u, v, each [rows]): prune u, restore v."""

    def find(w: Tensor, keep: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prune, restore = costs(w, keep, c, gram.diagonal())
        row = torch.arange(w.shape[0], device=w.device)
        u1, v2 = prune.argmin(dim=1), restore.argmin(dim=1)
        change1, v1 = (restore - 2 * w[row, u1, None] * w * gram[u1]).min(dim=1)
        change2, u2 = (prune - 2 * w[row, v2, None] * w * gram[v2]).min(dim=1)
        change1, change2 = change1 + prune[row, u1], change2 + restore[row, v2]
        first = change1 <= change2
        change = torch.where(first, change1, change2).nan_to_num(nan=torch.inf)  # a row of one kind has no swap
        return change, torch.where(first, u1, u2), torch.where(first, v1, v2)

    return find


def best_in_groups(gram: Tensor, m: int):
    """The same with both inside one group of m inputs: all of a row's swaps are looked at."""
    width = gram.shape[0]
    groups = width // m
    inside = gram.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, m, m]

    def find(w: Tensor, keep: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = w.shape[0]
        prune, restore = (cost.view(rows, groups, m) for cost in costs(w, keep, c, gram.diagonal()))
        grouped = w.view(rows, groups, m)
        change = torch.full((rows,), torch.inf, dtype=w.dtype, device=w.device)
        u = torch.zeros(rows, dtype=torch.long, device=w.device)
        v = u.clone()
        for i in range(m):  # prune the i-th of a group, restore any other
            pairs = prune[:, :, i, None] + restore - 2 * grouped[:, :, i, None] * grouped * inside[:, i]
            best, place = pairs.nan_to_num_(nan=torch.inf).view(rows, width).min(dim=1)
            better = best < change
            change = torch.where(better, best, change)
            u = torch.where(better, place // m * m + i, u)
            v = torch.where(better, place, v)
        return change, u, v

    return find
