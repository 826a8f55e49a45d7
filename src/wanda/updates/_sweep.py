"""The sweep of SparseGPT (Frantar, Alistarh, arXiv:2301.00774, Algorithm 1) over given slices of columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wanda.factors import dead_inputs, inverse_factor
from wanda.updates import Problem

LEAF = 8  # columns that are swept one by one; wider ranges are halved, their errors pushed on by matrix products


def sweep(problem: Problem, slices: list[slice], choose: Callable[[Tensor, slice], Tensor]) -> tuple[Tensor, Tensor]:
    """Columns left to right: the error w / u_jj of each removed weight is pushed onto the later columns by u.

    slices: consecutive, together all columns. choose: (current weights [out, k], slice) -> mask [out, k], called once
    a slice when all earlier errors have arrived there. Dead inputs are zeroed. With a right-hand side beyond W G the
    sweep starts at its damped least-squares solution W + beyond (G + d I)^-1. Returns (weights, mask), [out, in].
    """
    u = inverse_factor(problem.statistics)
    start = problem.weight
    if (beyond := problem.beyond()) is not None:
        start = start + (beyond @ u.T @ u).mul_(2 / problem.statistics.tokens)  # u^T u = (2 G / tokens + d I)^-1
    w = torch.where(dead_inputs(problem.statistics), 0, start).T.contiguous()  # [in, out]: a column is contiguous
    errors = torch.empty_like(w)
    keep = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    inverse_diagonal = u.diagonal().reciprocal()

    def columns(lo: int, hi: int) -> None:
        if hi - lo > LEAF:
            middle = (lo + hi) // 2
            columns(lo, middle)
            w[middle:hi].addmm_(u[lo:middle, middle:hi].T, errors[lo:middle], alpha=-1)
            columns(middle, hi)
            return
        for j in range(lo, hi):
            torch.mul(w[j], inverse_diagonal[j], out=errors[j]).masked_fill_(keep[j], 0)
            if j + 1 < hi:
                w[j + 1 : hi].addr_(u[j, j + 1 : hi], errors[j], alpha=-1)

    def over(first: int, last: int) -> None:
        lo, hi = slices[first].start, slices[last - 1].stop
        if last - first == 1:
            keep[lo:hi] = choose(w[lo:hi].T, slices[first]).T
            columns(lo, hi)
            return
        middle = (first + last) // 2
        over(first, middle)
        cut = slices[middle].start
        w[cut:hi].addmm_(u[lo:cut, cut:hi].T, errors[lo:cut], alpha=-1)
        over(middle, last)

    over(0, len(slices))
    return w.masked_fill_(~keep, 0).T.contiguous(), keep.T.contiguous()
