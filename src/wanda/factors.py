"""Factors of a damped Gram matrix: made once per input, shared by every score and update of the matrices that read it.

A matrix that is not positive definite (float32 sums of nearly dependent features, or broken inputs) gets ten times the
damping until it is, with a sentence in statistics.notes; nothing else ever stands in for a factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wanda.errors import RunError
from wanda.statistics import Statistics

RAISES = 9  # of the damping, tenfold each


def dead_inputs(statistics: Statistics) -> Tensor:
    """The input features that were zero on every calibration token: bool [in]."""
    assert statistics.square_sum is not None
    return statistics.square_sum == 0


def cholesky(matrix: Tensor, damping: float, what: str, notes: list[str]) -> Tensor:
    """Lower Cholesky factor of matrix + damping I, the damping raised tenfold until it exists; matrix is overwritten.

    A raise is said in notes. Raises RunError when the matrix is not finite or no damping helps.
    """
    if not bool(torch.isfinite(matrix.sum())):
        raise RunError(f"the {what} is not finite: the activations overflowed; calibrate in float32 or bfloat16")
    matrix.diagonal().add_(damping)
    added = tried = damping
    for _ in range(RAISES + 1):
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            if added > damping:
                notes.append(
                    f"the {what} was not positive definite: damping raised from {damping:.3g} to {added:.3g};"
                    " more calibration tokens would cure it"
                )
            return factor
        tried, wanted = added, max(added * 10, 1e-12)
        matrix.diagonal().add_(wanted - added)
        added = wanted
    raise RunError(f"the {what} is not positive definite even with a damping of {tried:.3g}; check the activations")


def inverse_factor(statistics: Statistics) -> Tensor:
    """Upper triangular u with u^T u = (H + d I)^-1, H = 2 G / tokens, d = 0.01 mean diag H: [in, in].

    SparseGPT's factor (arXiv:2301.00774, section 3.3); H_jj = 1 at dead inputs. Written backwards, H = R R^T with R
    upper triangular and u = R^-1, so that one factorisation and one triangular inverse do.
    """
    if "inverse factor" not in statistics.cache:
        assert statistics.gram is not None
        scaled = statistics.gram * (2 / max(statistics.tokens, 1))
        damping = 0.01 * float(scaled.diagonal().mean())
        scaled.diagonal().add_(dead_inputs(statistics).float())
        lower = cholesky(scaled.flip(0, 1), damping, "Hessian of the sweep", statistics.notes)
        statistics.cache["inverse factor"] = triangular_inverse(lower).flip(0, 1).contiguous()
    return statistics.cache["inverse factor"]


def triangular_inverse(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, by halves: a third of the work of solving for the identity."""
    n = lower.shape[0]
    if n <= 256:
        return torch.linalg.solve_triangular(lower, torch.eye(n, dtype=lower.dtype, device=lower.device), upper=False)
    half = n // 2
    result = torch.zeros_like(lower)
    result[:half, :half] = triangular_inverse(lower[:half, :half])
    result[half:, half:] = triangular_inverse(lower[half:, half:])
    result[half:, :half] = -result[half:, half:] @ (lower[half:, :half] @ result[:half, :half])
    return result


def admm_inverse(statistics: Statistics) -> tuple[Tensor, float, Tensor]:
    """(n, d, (H + I)^-1) of arXiv:2401.02938: n = sqrt(diag G) + 1e-8, H = G / (n n^T) + d I, d = 0.1 mean diag."""
    if "admm inverse" not in statistics.cache:
        assert statistics.gram is not None
        norm = statistics.input_norm() + 1e-8
        system = statistics.gram / norm / norm[:, None]
        damping = 0.1 * float(system.diagonal().mean())
        lower = cholesky(system, damping + 1, "normalised Gram matrix", statistics.notes)
        statistics.cache["admm inverse"] = (norm, damping, torch.cholesky_inverse(lower))
    return statistics.cache["admm inverse"]
