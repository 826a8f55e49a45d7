"""PCG: survivors refit by preconditioned conjugate gradients, mask fixed (ALPS, arXiv:2406.07831, Algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from wanda.errors import RunError
from wanda.factors import RAISES
from wanda.statistics import Needs
from wanda.updates import UPDATES, Problem

STEPS = 10


@UPDATES.register
class PCG:
    """Solve B (G + d I) = W (G + d I) on every row's survivors, d = 0.01 mean diag G, preconditioned by the diagonal.

    Starts at what the chain left, else at the masked weights. Step lengths are per row.
    """

    needs = Needs.GRAM
    owns_mask = False
    takes_chain = True
    solves = True
    within_rows = False
    factor_memory = 0
    weight_memory = (28, 28)

    def __call__(self, problem: Problem) -> tuple[Tensor, Tensor]:
        gram = problem.statistics.gram
        assert gram is not None
        mask = problem.select(problem.weight, slice(None)) if problem.mask is None else problem.mask
        start = problem.weight * mask if problem.solution is None else problem.solution
        beyond = problem.beyond()
        damping = tried = first = 0.01 * float(gram.diagonal().mean())
        for _ in range(RAISES + 1):
            solution = torch.empty_like(start)
            if all(
                refit(
                    problem.weight[rows],
                    start[rows],
                    mask[rows],
                    gram,
                    damping,
                    None if beyond is None else beyond[rows],
                    out=solution[rows],
                )
                for rows in problem.row_panels()
            ):
                if damping > first:
                    problem.notes.append(
                        f"the Gram matrix was not positive definite: damping raised from {first:.3g} to {damping:.3g};"
                        " more calibration tokens would cure it"
                    )
                return solution, mask
            tried, damping = damping, max(damping * 10, 1e-12)
        raise RunError(f"the Gram matrix is not positive definite even with a damping of {tried:.3g}; check the inputs")


def refit(
    weight: Tensor, start: Tensor, mask: Tensor, gram: Tensor, damping: float, beyond: Tensor | None, out: Tensor
) -> bool:
    """Refit some rows [rows, in] into out; False when a direction of no or negative curvature shows up.

    A row whose residual has come down to rounding errors is done: its curvature would say nothing. Every product
    is p G + d p in one call, so that the damped matrix is never formed.
    """
    keep = mask.to(weight.dtype)
    scale = gram.diagonal() + damping  # the preconditioner [in]
    inverse_scale = torch.where(scale > 0, 1 / scale, 0)
    solution = out.copy_(start)
    error = weight - solution
    residual = torch.addmm(error, error, gram, beta=damping)
    if beyond is not None:
        residual += beyond
    residual *= keep
    z = residual * inverse_scale
    direction = z.clone()
    rz = torch.linalg.vecdot(residual, z)[:, None]
    rounding = rz * torch.finfo(rz.dtype).eps ** 2
    image = error  # its memory
    for step in range(STEPS):
        torch.addmm(direction, direction, gram, beta=damping, out=image).mul_(keep)
        curvature = torch.linalg.vecdot(direction, image)[:, None]
        going = rz > rounding
        if bool(((curvature <= 0) & going).any()):
            return False
        length = torch.where(going, rz / curvature, 0)
        solution.addcmul_(direction, length)
        if step == STEPS - 1:
            break
        residual.addcmul_(image, length, value=-1)
        torch.mul(residual, inverse_scale, out=z)
        rz_new = torch.linalg.vecdot(residual, z)[:, None]
        direction.mul_(torch.where(going, rz_new / rz, 0)).add_(z)
        rz = rz_new
    return True
